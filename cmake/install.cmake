# `cmake --install`: library, tvm-ffi's library, backends, command, headers, CMake package.
include(CMakePackageConfigHelpers)

install(TARGETS ditattn EXPORT ditattn-targets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(DITATTN_BUILD_TOOLS)
  install(TARGETS ditattn_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(FILES ${PROJECT_BINARY_DIR}/lib/libtvm_ffi.so DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/ditattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT ditattn-targets NAMESPACE ditattn:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ditattn)
configure_package_config_file(cmake/ditattn-config.cmake.in ${PROJECT_BINARY_DIR}/ditattn-config.cmake
                              INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ditattn)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/ditattn-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/ditattn-config.cmake ${PROJECT_BINARY_DIR}/ditattn-config-version.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ditattn)
