#pragma once

#include <filesystem>
#include <string>

#include "ditattn/backend.hpp"

namespace ditattn {

/// The class `class_name` of a plug-in file. An ImportError says why there is none: the file fails to load, lacks the
/// export or the class, or its table is not ours. The file is opened once and stays open.
///
/// Thread-safe, and no lock is held while the file's initialisers run: they may register classes, and the dynamic
/// linker has locks of its own.
BackendClass load_plugin_class(const std::filesystem::path& file, const std::string& class_name);

}  // namespace ditattn
