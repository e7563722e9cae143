#pragma once

#include <filesystem>
#include <functional>
#include <iosfwd>

#include "ditattn/export.hpp"

namespace ditattn {

/// Writes a file so that nobody ever sees a part of it: aside in the same folder, on the disk, then renamed. Two
/// writers of one file do not disturb each other: the later one wins. `what` ("safetensors file") names it in errors.
/// FileError with the system's reason; nothing is left behind then.
DITATTN_API void write_atomically(const std::filesystem::path& file, const char* what,
                                  const std::function<void(std::ostream&)>& content);

}  // namespace ditattn
