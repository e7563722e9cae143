# Everything the build takes from elsewhere, found here and nowhere else.

find_package(Threads REQUIRED)
find_package(fmt REQUIRED)
find_package(spdlog REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)

# Processes as ranks: in a library of its own, ditattn_mpi.
if(DITATTN_MPI AND NOT DITATTN_SANITIZE)
  set(MPI_CXX_SKIP_MPICXX ON)
  find_package(MPI COMPONENTS CXX QUIET)
  if(MPI_CXX_FOUND)
    message(STATUS "MPI: found, version ${MPI_CXX_VERSION}; building ditattn_mpi")
  else()
    message(STATUS "MPI: not found; ranks are threads only (Debian: scripts/packages-mpi.txt)")
  endif()
endif()

# Shared libraries, or headers alone: the sources that use them take 60 % longer to compile then, but what comes out runs
# on machines without the libraries.
add_library(ditattn_fmt INTERFACE)
add_library(ditattn_spdlog INTERFACE)
if(DITATTN_HEADER_ONLY)
  set_target_properties(spdlog::spdlog_header_only PROPERTIES  # Debian's asks for the shared fmt even so
                        INTERFACE_LINK_LIBRARIES "Threads::Threads;fmt::fmt-header-only")
  target_link_libraries(ditattn_fmt INTERFACE fmt::fmt-header-only)
  target_link_libraries(ditattn_spdlog INTERFACE spdlog::spdlog_header_only)
else()
  target_link_libraries(ditattn_fmt INTERFACE fmt::fmt)
  target_link_libraries(ditattn_spdlog INTERFACE spdlog::spdlog)
endif()

# tvm-ffi is a Python package: its CMake files ask the interpreter that has it for their paths.
if(NOT Python_EXECUTABLE AND EXISTS ${PROJECT_SOURCE_DIR}/.venv/bin/python)
  set(Python_EXECUTABLE ${PROJECT_SOURCE_DIR}/.venv/bin/python)
endif()
find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config --cmakedir
  OUTPUT_VARIABLE tvm_ffi_cmake_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE tvm_ffi_missing)
if(tvm_ffi_missing)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no apache-tvm-ffi. Run `make setup`, or pass -DPython_EXECUTABLE.")
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.metadata; print(importlib.metadata.version('apache-tvm-ffi'))"
  OUTPUT_VARIABLE tvm_ffi_version OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sys; print(*sys.path[1:], sep=';')"  # where headers from PyPI are looked for
  OUTPUT_VARIABLE ditattn_python_path OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(tvm_ffi CONFIG REQUIRED PATHS ${tvm_ffi_cmake_dir} NO_DEFAULT_PATH)
ditattn_map_folder(${tvm_ffi_INCLUDE_DIR} tvm_ffi)  # pip builds a wheel with a new copy each time

# The copy beside our own libraries makes a build or install tree movable; its headers are not ours to warn about.
configure_file(${tvm_ffi_LIB_FILES} ${PROJECT_BINARY_DIR}/lib/libtvm_ffi.so COPYONLY)
set_target_properties(tvm_ffi::shared PROPERTIES IMPORTED_LOCATION ${PROJECT_BINARY_DIR}/lib/libtvm_ffi.so)
