#pragma once

/// Version of the library (semantic versioning). CMake reads it from here: the one place to change it.
#define DITATTN_VERSION "0.1.0"

/// Version of the plug-in interface: the functions of the table, their arguments, and the layouts of
/// `AttentionMetadata` and of the classes in backend.hpp. A plug-in compiled for another one is refused when it is
/// loaded.
#define DITATTN_INTERFACE_VERSION 3
