#pragma once

#include <algorithm>
#include <string>
#include <string_view>

namespace ditattn {

/// ASCII only, whatever the locale.
constexpr char upper_case(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; }

/// How names from the environment, configuration and command line are read.
inline std::string upper_case(std::string text) {
  std::ranges::transform(text, text.begin(), [](char c) { return upper_case(c); });
  return text;
}

/// Whether they differ in case alone.
constexpr bool same_name(std::string_view a, std::string_view b) {
  return std::ranges::equal(a, b, [](char x, char y) { return upper_case(x) == upper_case(y); });
}

}  // namespace ditattn
