# `cmake --install`, by components: `package` is what every tree has, a wheel too; `runtime` the command and tvm-ffi's
# library, `development` headers and the CMake and pkg-config packages, `mpi` the MPI transport, `python` and `python_mpi`
# the Python package, which a wheel has and a Debian package has not (cmake/debian.cmake).
include(CMakePackageConfigHelpers)

install(TARGETS ditattn EXPORT ditattn-targets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT package NAMELINK_COMPONENT development)
if(TARGET ditattn_mpi)
  install(TARGETS ditattn_mpi EXPORT ditattn-mpi-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT mpi)
  install(EXPORT ditattn-mpi-targets NAMESPACE ditattn:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ditattn COMPONENT mpi)
endif()
if(TARGET ditattn_nccl)
  install(TARGETS ditattn_nccl EXPORT ditattn-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT package)
endif()
if(DITATTN_BUILD_TOOLS)
  install(TARGETS ditattn_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT runtime)
  install(TARGETS ditattn_command LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT package)
  install(FILES examples/digits/capture.safetensors DESTINATION ${CMAKE_INSTALL_DATADIR}/ditattn COMPONENT package)
endif()
install(FILES ${PROJECT_BINARY_DIR}/lib/libtvm_ffi.so DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime)
install(FILES LICENSE THIRD_PARTY.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR} COMPONENT runtime)

# tvm-ffi's headers beside ours, those that this library was compiled with: what is built with an installed tree needs
# nothing else. In a folder of their own, because the system may have others.
set(tvm_ffi_headers ${CMAKE_INSTALL_INCLUDEDIR}/ditattn-tvm-ffi)
install(DIRECTORY include/ditattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development)
install(DIRECTORY ${tvm_ffi_INCLUDE_DIR}/tvm ${tvm_ffi_DLPACK_INCLUDE_DIR}/dlpack DESTINATION ${tvm_ffi_headers}
        COMPONENT development)

set(package_directory ${CMAKE_INSTALL_LIBDIR}/cmake/ditattn)
install(EXPORT ditattn-targets NAMESPACE ditattn:: DESTINATION ${package_directory} COMPONENT development)
configure_package_config_file(cmake/ditattn-config.cmake.in ${PROJECT_BINARY_DIR}/ditattn-config.cmake
                              INSTALL_DESTINATION ${package_directory} PATH_VARS CMAKE_INSTALL_LIBDIR tvm_ffi_headers)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/ditattn-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/ditattn-config.cmake ${PROJECT_BINARY_DIR}/ditattn-config-version.cmake
        DESTINATION ${package_directory} COMPONENT development)
install(FILES cmake/plugin.cmake DESTINATION ${package_directory} RENAME ditattn-plugin.cmake COMPONENT development)

# pkg-config's file leads to the prefix from its own folder, so that the tree may be moved.
function(ditattn_pkg_config directory prefix output)
  file(RELATIVE_PATH to_prefix ${directory} ${prefix})
  configure_file(cmake/ditattn.pc.in ${output} @ONLY)
endfunction()
ditattn_pkg_config(/${CMAKE_INSTALL_LIBDIR}/pkgconfig / ${PROJECT_BINARY_DIR}/ditattn.pc)
install(FILES ${PROJECT_BINARY_DIR}/ditattn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT development)

include(cmake/sbom.cmake)
include(cmake/debian.cmake)
