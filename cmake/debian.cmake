# Debian packages by CPack (make deb): `ditattn`, what runs; `ditattn-dev`, what is built with; `ditattn-mpi`, so that
# nobody needs Open MPI who does not use it. No Python package: it needs apache-tvm-ffi of PyPI's, and the wheel has it.
#
# The packages hold the install tree as it is, in /usr/lib/ditattn: libtvm_ffi.so has no version in its name and must not
# meet another copy in the linker's folders, and run paths lead to it from $ORIGIN. What others look for elsewhere leads
# there: /usr/bin/ditattn and the files for CMake and pkg-config.
set(DITATTN_MAINTAINER "ditattn's maintainers <ditattn@localhost>" CACHE STRING
    "Who answers for the Debian packages: a name and an address that mail reaches")
set(root ../..)  # seen from /usr/lib/ditattn
set(staged ${PROJECT_BINARY_DIR}/debian)
file(MAKE_DIRECTORY ${staged})

file(CREATE_LINK ../lib/ditattn/${CMAKE_INSTALL_BINDIR}/ditattn ${staged}/ditattn SYMBOLIC)
install(FILES ${staged}/ditattn DESTINATION ${root}/bin COMPONENT runtime_debian EXCLUDE_FROM_ALL)
foreach(file ditattn-config.cmake ditattn-config-version.cmake)
  file(WRITE ${staged}/${file} "include(\"\${CMAKE_CURRENT_LIST_DIR}/../../ditattn/${package_directory}/${file}\")\n")
  install(FILES ${staged}/${file} DESTINATION ${root}/lib/cmake/ditattn COMPONENT development_debian EXCLUDE_FROM_ALL)
endforeach()
set(pkg_config_directory lib/${CMAKE_LIBRARY_ARCHITECTURE}/pkgconfig)
ditattn_pkg_config(/${pkg_config_directory} /lib/ditattn ${staged}/ditattn.pc)
install(FILES ${staged}/ditattn.pc DESTINATION ${root}/${pkg_config_directory} COMPONENT development_debian EXCLUDE_FROM_ALL)

# What Debian's policy asks of every package.
file(READ cmake/debian_copyright.in head)
file(WRITE ${staged}/copyright "${head}")
file(WRITE ${staged}/changelog "ditattn (${PROJECT_VERSION}) stable; urgency=medium

  * See CHANGELOG.md.

 -- ${DITATTN_MAINTAINER}  Thu, 01 Jan 1970 00:00:00 +0000
")
execute_process(COMMAND gzip -9nf ${staged}/changelog)
foreach(component runtime development mpi)
  set(name ditattn)
  if(component STREQUAL development)
    set(name ditattn-dev)
  elseif(component STREQUAL mpi)
    set(name ditattn-mpi)
  endif()
  install(FILES ${staged}/copyright ${staged}/changelog.gz DESTINATION ${root}/share/doc/${name}
          COMPONENT ${component}_debian EXCLUDE_FROM_ALL)
endforeach()

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME ditattn)
set(CPACK_PACKAGE_CONTACT "${DITATTN_MAINTAINER}")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr/lib/ditattn)
set(CPACK_PACKAGE_DIRECTORY ${PROJECT_BINARY_DIR}/debian)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE
                                                WORLD_READ WORLD_EXECUTE)
set(CPACK_STRIP_FILES ON)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_ENABLE_COMPONENT_DEPENDS OFF)
set(CPACK_COMPONENTS_GROUPING ONE_PER_GROUP)
set(CPACK_COMPONENTS_ALL package runtime runtime_debian development development_debian)
if(TARGET ditattn_mpi)
  list(APPEND CPACK_COMPONENTS_ALL mpi mpi_debian)
endif()
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS ${PROJECT_BINARY_DIR}/lib)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)

set(CPACK_DEBIAN_RUNTIME_PACKAGE_NAME ditattn)
set(CPACK_DEBIAN_RUNTIME_PACKAGE_SECTION science)
set(CPACK_DEBIAN_RUNTIME_DESCRIPTION
    "The command line, the library and its back ends: one name picks the kernel\nthat computes a model's attention, on this CPU or on NVIDIA GPUs.")
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME ditattn-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SHLIBDEPS OFF)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS "ditattn (= ${PROJECT_VERSION})")
set(CPACK_DEBIAN_DEVELOPMENT_DESCRIPTION
    "Headers, with those of tvm-ffi, and the CMake and pkg-config packages, to use\nthe library and to write back ends.")
set(CPACK_DEBIAN_MPI_PACKAGE_NAME ditattn-mpi)
set(CPACK_DEBIAN_MPI_PACKAGE_SECTION science)
set(CPACK_DEBIAN_MPI_PACKAGE_DEPENDS "ditattn (= ${PROJECT_VERSION})")
set(CPACK_DEBIAN_MPI_DESCRIPTION
    "The library by which processes under mpirun are ranks of one attention.")

include(CPack)
cpack_add_component(package GROUP runtime)
foreach(group runtime development mpi)
  cpack_add_component_group(${group})
  cpack_add_component(${group} GROUP ${group})
  cpack_add_component(${group}_debian GROUP ${group})
endforeach()
