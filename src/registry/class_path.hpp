#pragma once

#include <string>

namespace ditattn {

/// A class path taken apart: "a.b.C" is class "C" of module "a.b".
struct ClassPath {
  std::string module;
  std::string class_name;

  /// ClassPathError unless `text` is dot-separated segments of [A-Za-z_][A-Za-z0-9_]*, two at least: what passes can
  /// never name a file outside the search path.
  static ClassPath parse(const std::string& text);

  /// The module's file relative to a search directory: "a/b.so".
  [[nodiscard]] std::string relative_file() const;
};

}  // namespace ditattn
