# Settles DITATTN_CUDA: with AUTO it is off where there is no fitting nvcc.
if(NOT DITATTN_CUDA)
  return()
endif()
set(oldest_nvcc 12.8)  # the first that knows sm_100 and sm_120

# nvcc: what CUDACXX, CMAKE_CUDA_COMPILER or the PATH name, the toolkit in /usr/local/cuda, or PyPI's packages.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  list(TRANSFORM ditattn_python_path APPEND /nvidia/cu13/bin OUTPUT_VARIABLE pypi_nvcc)
  find_program(ditattn_nvcc nvcc PATHS /usr/local/cuda/bin ${pypi_nvcc})
  set(problem "")
  if(NOT ditattn_nvcc)
    set(problem "there is no nvcc on the PATH, in /usr/local/cuda/bin or among the packages of ${Python_EXECUTABLE}")
  elseif(DITATTN_CUDA STREQUAL AUTO)
    execute_process(COMMAND ${ditattn_nvcc} --version OUTPUT_VARIABLE nvcc_version)
    if(NOT nvcc_version MATCHES "release ([0-9.]+)" OR CMAKE_MATCH_1 VERSION_LESS oldest_nvcc)
      set(problem "${ditattn_nvcc} is not of CUDA ${oldest_nvcc} or newer")
    endif()
  endif()
  if(problem AND DITATTN_CUDA STREQUAL AUTO)
    message(STATUS "DITATTN_CUDA=AUTO: no GPU back ends, because ${problem}")
    set(DITATTN_CUDA OFF)
    return()
  elseif(problem)
    message(FATAL_ERROR "DITATTN_CUDA is on, but ${problem}. Install CUDA 13's toolkit, run `make cuda` (nvcc from "
                        "PyPI), pass -DCMAKE_CUDA_COMPILER=…/nvcc, or configure with -DDITATTN_CUDA=OFF.")
  endif()
  set(CMAKE_CUDA_COMPILER ${ditattn_nvcc})
endif()
# Machine code for each generation, and PTX of the newest for those to come.
set(DITATTN_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real 100-real 120 CACHE STRING
    "GPU architectures to compile for, as CMake's CUDA_ARCHITECTURES has them")
# How many of the kernels that are compiled per head size and dtype: all, or one of each kind, to see that they compile.
set(DITATTN_CUDA_SET full CACHE STRING "GPU kernels to compile: full or ci")
set_property(CACHE DITATTN_CUDA_SET PROPERTY STRINGS full ci)
if(DITATTN_CUDA_SET STREQUAL full)
  set(DITATTN_CUDA_HEAD_SIZES 64 128 256)
  set(DITATTN_CUDA_DTYPES float16 bfloat16)
elseif(DITATTN_CUDA_SET STREQUAL ci)
  set(DITATTN_CUDA_HEAD_SIZES 128)
  set(DITATTN_CUDA_DTYPES bfloat16)
else()
  message(FATAL_ERROR "DITATTN_CUDA_SET is ${DITATTN_CUDA_SET}; it may be full or ci.")
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${DITATTN_CUDA_ARCHITECTURES})
endif()
enable_language(CUDA)
message(STATUS "DITATTN_CUDA=${DITATTN_CUDA}: GPU back ends by ${CMAKE_CUDA_COMPILER}, ${CMAKE_CUDA_COMPILER_VERSION}")
set(DITATTN_CUDA ON)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS oldest_nvcc)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_CUDA_COMPILER_VERSION}; ${oldest_nvcc} is the oldest that "
                      "knows every architecture here.")
endif()
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
add_compile_options($<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)  # a third of the default's size
