#pragma once

#include <algorithm>
#include <string>

namespace ditattn {

/// ASCII upper case, whatever the locale: how names from the environment, configuration and command line are read.
inline std::string upper_case(std::string text) {
  std::ranges::transform(text, text.begin(),
                         [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; });
  return text;
}

}  // namespace ditattn
