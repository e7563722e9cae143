# Hardening of every program and shared library of this build, and what keeps the build folder's path out of them.
# SECURITY.md says what it is for and what it costs; tests/install/test_hardening.py looks at what comes out.
#
# Set for the directory, not in ditattn_options, so that no target is forgotten. GPU code has no such options; the host
# code beside it, which only launches kernels, is linked like the rest.
include(CheckCXXCompilerFlag)
include(CheckPIESupported)

option(DITATTN_HARDENING "Stack protection, control-flow protection, checked C functions, read-only relocations" ON)

# The same tree gives the same files wherever it lies: __FILE__ (tvm-ffi's headers use it) and debug information name
# places inside it. The last map that fits wins, and the build folder lies inside the source's.
function(ditattn_map_folder folder name)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${folder}=${name}>)
endfunction()
ditattn_map_folder(${PROJECT_SOURCE_DIR} .)
ditattn_map_folder(${PROJECT_BINARY_DIR} build)
add_link_options(LINKER:--build-id=sha1)  # of the content

check_pie_supported(LANGUAGES CXX)  # else CMake compiles programs as PIE, and leaves it to the compiler to link them so
if(NOT DITATTN_HARDENING OR DITATTN_SANITIZE)  # sanitizers check more, and replace the functions that FORTIFY does
  return()
endif()

foreach(flag -fstack-protector-strong -fstack-clash-protection -fcf-protection=full -mbranch-protection=standard)
  string(MAKE_C_IDENTIFIER has${flag} variable)
  check_cxx_compiler_flag(${flag} ${variable})  # the last two belong to one architecture each
  if(${variable})
    add_compile_options($<$<COMPILE_LANGUAGE:CXX>:${flag}>)
  endif()
endforeach()
# Only where code is optimised: it does nothing elsewhere, and says so. Undefined first: some distributions define it.
add_compile_options("$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<NOT:$<CONFIG:Debug>>>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=2>")
# Text relocations would need code that is writable for a while.
add_link_options(LINKER:-z,relro LINKER:-z,now LINKER:-z,noexecstack LINKER:-z,text)
