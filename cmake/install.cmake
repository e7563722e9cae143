# `cmake --install`: library, tvm-ffi's library, backends, command, headers, CMake package. The component `package` is
# what a wheel has: all that the Python package needs but tvm-ffi.
include(CMakePackageConfigHelpers)

install(TARGETS ditattn EXPORT ditattn-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT package)
if(TARGET ditattn_mpi)
  install(TARGETS ditattn_mpi EXPORT ditattn-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
if(TARGET ditattn_nccl)
  install(TARGETS ditattn_nccl EXPORT ditattn-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT package)
endif()
if(DITATTN_BUILD_TOOLS)
  install(TARGETS ditattn_cli)
  install(TARGETS ditattn_command LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT package)
  install(FILES examples/digits/capture.safetensors DESTINATION ${CMAKE_INSTALL_DATADIR}/ditattn COMPONENT package)
endif()
install(FILES ${PROJECT_BINARY_DIR}/lib/libtvm_ffi.so DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/ditattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
set(package_directory ${CMAKE_INSTALL_LIBDIR}/cmake/ditattn)
install(EXPORT ditattn-targets NAMESPACE ditattn:: DESTINATION ${package_directory})
configure_package_config_file(cmake/ditattn-config.cmake.in ${PROJECT_BINARY_DIR}/ditattn-config.cmake
                              INSTALL_DESTINATION ${package_directory} PATH_VARS CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/ditattn-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/ditattn-config.cmake ${PROJECT_BINARY_DIR}/ditattn-config-version.cmake
        DESTINATION ${package_directory})
install(FILES cmake/plugin.cmake DESTINATION ${package_directory} RENAME ditattn-plugin.cmake)
