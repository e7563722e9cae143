#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ditattn::cli {

/// A shared library that is not needed, but that back ends may use where it is there.
struct OptionalLibrary {
  const char* name;
  std::vector<const char*> sonames;  ///< the first that loads counts
  const char* purpose;
  std::vector<const char*> used_by;  ///< members that use it in this version
  const char* install;
};

/// All optional libraries; what is built on another comes after it.
std::span<const OptionalLibrary> optional_libraries();

/// The optional library that has this soname, or null: "libcudnn.so.9" is cuDNN's, "libcudnn_graph.so.9" too.
const OptionalLibrary* library_of(std::string_view soname);

/// What became of a library: the file it was loaded from, or the reason why not; the other one is empty.
struct Probe {
  std::string file;
  std::string reason;
};

/// Loads the first of `sonames` that can be, lazily and locally, and calls nothing in it.
///
/// It happens in a child process: a broken library may crash or hang, and one that stays loaded would change what
/// the back ends find after it.
Probe probe_library(const std::vector<const char*>& sonames);

}  // namespace ditattn::cli
