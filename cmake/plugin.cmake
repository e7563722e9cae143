# Plug-ins, in this build and, from the installed package, in others' projects.
#
#   ditattn_add_plugin(<target> MODULE package.module SOURCES file.cpp…
#                      [LIBRARIES library…] [OUTPUT_DIRECTORY directory])
#
# builds the module file that class paths `package.module.Class` are looked for in: <directory>/package/module.so. The
# directory, by default ${CMAKE_BINARY_DIR}/plugins, is what goes on DITATTN_PLUGIN_PATH.

# Splits package.module into the folder and the file's stem; stops at what no class path can name.
function(ditattn_split_module module folder_variable stem_variable)
  if(NOT module MATCHES "^[A-Za-z_][A-Za-z0-9_]*(\\.[A-Za-z_][A-Za-z0-9_]*)*$")
    message(FATAL_ERROR "'${module}' is no module path. Give names joined by dots, each of letters, digits and "
                        "underscores and not starting with a digit: package.module")
  endif()
  string(REPLACE "." "/" file ${module})
  cmake_path(GET file PARENT_PATH folder)
  cmake_path(GET file FILENAME stem)
  set(${folder_variable} "${folder}" PARENT_SCOPE)
  set(${stem_variable} ${stem} PARENT_SCOPE)
endfunction()

function(ditattn_add_plugin target)
  cmake_parse_arguments(ARG "" "MODULE;OUTPUT_DIRECTORY" "SOURCES;LIBRARIES" ${ARGN})
  if(NOT ARG_MODULE OR NOT ARG_SOURCES OR ARG_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "ditattn_add_plugin(${target} ${ARGN}): expected MODULE package.module SOURCES file.cpp… "
                        "[LIBRARIES library…] [OUTPUT_DIRECTORY directory]")
  endif()
  if(NOT ARG_OUTPUT_DIRECTORY)
    set(ARG_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/plugins)
  endif()
  ditattn_split_module(${ARG_MODULE} folder stem)
  add_library(${target} MODULE ${ARG_SOURCES})
  target_link_libraries(${target} PRIVATE ditattn::ditattn ${ARG_LIBRARIES})
  set_target_properties(${target} PROPERTIES
    PREFIX "" SUFFIX ".so" OUTPUT_NAME ${stem} DEBUG_POSTFIX "" CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
    LIBRARY_OUTPUT_DIRECTORY ${ARG_OUTPUT_DIRECTORY}/${folder}$<0:>)  # $<0:>: no folder per configuration
endfunction()
