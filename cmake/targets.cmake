# How our targets are made: warnings, sanitizers, run paths, and one function per kind of target.
include(cmake/plugin.cmake)

add_library(ditattn_options INTERFACE)
target_compile_options(ditattn_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wno-restrict
                                                 -fno-omit-frame-pointer)
if(DITATTN_SANITIZE)
  target_compile_options(ditattn_options INTERFACE -fsanitize=${DITATTN_SANITIZE} -fno-sanitize-recover=all)
  target_link_options(ditattn_options INTERFACE -fsanitize=${DITATTN_SANITIZE})
  if(DITATTN_SANITIZE STREQUAL thread)
    target_compile_options(ditattn_options INTERFACE -Wno-tsan)  # tvm-ffi's headers have fences, which it cannot see
  endif()
  if(DITATTN_SANITIZE MATCHES fuzzer)  # Clang's alone, which does not know all of GCC's warnings and what GCC defines
    target_compile_options(ditattn_options INTERFACE -Wno-unknown-warning-option)
    target_compile_definitions(ditattn_options INTERFACE __SANITIZE_ADDRESS__)
  endif()
endif()

# Finds its libraries beside itself (build/lib, build/bin) and in an installed tree alike.
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)
set(CMAKE_INSTALL_RPATH "$ORIGIN;$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")

# One plug-in per enum member: backends/<folder> builds the object library `ditattn_<folder>` (to link in statically)
# and from it the module file named by the member's class path.
#   ditattn_add_backend(flash_attn MODULE vllm_omni.diffusion.attention.backends.flash_attn
#                       SOURCES flash_attn_backend.cpp LIBRARIES ditattn_kernels_cpu)
function(ditattn_add_backend folder)
  cmake_parse_arguments(ARG "" "MODULE" "SOURCES;LIBRARIES" ${ARGN})
  add_library(ditattn_${folder} STATIC ${ARG_SOURCES})
  target_link_libraries(ditattn_${folder} PUBLIC ditattn ${ARG_LIBRARIES} PRIVATE ditattn_options)

  set(plugin_source ${CMAKE_CURRENT_BINARY_DIR}/${folder}_plugin.cpp)
  configure_file(${PROJECT_SOURCE_DIR}/cmake/plugin.cpp.in ${plugin_source})
  ditattn_add_plugin(ditattn_${folder}_plugin MODULE ${ARG_MODULE} SOURCES ${plugin_source}
                     LIBRARIES ditattn_${folder} ditattn_options
                     OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/lib/${DITATTN_BACKENDS_DIR})
  ditattn_split_module(${ARG_MODULE} directory stem)
  file(REMOVE ${PROJECT_BINARY_DIR}/lib/${DITATTN_BACKENDS_DIR}/${directory}/${stem}.not_built)  # an earlier build's
  file(RELATIVE_PATH to_lib /${DITATTN_BACKENDS_DIR}/${directory} /)
  set_target_properties(ditattn_${folder}_plugin PROPERTIES INSTALL_RPATH "$ORIGIN/${to_lib}")
  set_property(GLOBAL APPEND PROPERTY ditattn_backend_plugins ditattn_${folder}_plugin)
  install(TARGETS ditattn_${folder}_plugin
          LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/${DITATTN_BACKENDS_DIR}/${directory} COMPONENT package)
endfunction()

# Where installed backends lie, relative to the library's own directory (src/registry/search_path.cpp agrees).
set(DITATTN_BACKENDS_DIR ditattn/backends)

# A member whose backend is not built leaves its reason where the plug-in would be; look-ups quote it.
function(ditattn_backend_not_built module reason)
  ditattn_split_module(${module} directory stem)
  set(file ${PROJECT_BINARY_DIR}/lib/${DITATTN_BACKENDS_DIR}/${directory}/${stem}.not_built)
  file(WRITE ${file} "${reason}\n")
  install(FILES ${file} DESTINATION ${CMAKE_INSTALL_LIBDIR}/${DITATTN_BACKENDS_DIR}/${directory} COMPONENT package)
  message(STATUS "${module}: ${reason}")
endfunction()
