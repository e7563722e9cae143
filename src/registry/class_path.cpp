#include "registry/class_path.hpp"

#include <cxxabi.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <typeinfo>

#include "ditattn/errors.hpp"
#include "ditattn/registry.hpp"

namespace ditattn {
namespace {

// ASCII on purpose: isalpha depends on the locale.
bool is_letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool is_segment(std::string_view text) {
  return !text.empty() && is_letter(text[0]) &&
         std::ranges::all_of(text, [](char c) { return is_letter(c) || is_digit(c); });
}

}  // namespace

ClassPath ClassPath::parse(const std::string& text) {
  const std::size_t last_dot = text.rfind('.');
  if (last_dot == std::string::npos) {
    throw ClassPathError(fmt::format("Class path '{}' has no dot. Expected 'package.module.Class'.", text));
  }
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find('.', begin), text.size());
    const std::string_view segment = std::string_view(text).substr(begin, end - begin);
    if (!is_segment(segment)) {
      throw ClassPathError(fmt::format(
          "Class path '{}' has the bad segment '{}'. Segments are letters, digits and underscores, and do not start "
          "with a digit: 'package.module.Class'.",
          text, segment));
    }
    begin = end + 1;
  }
  return {.module = text.substr(0, last_dot), .class_name = text.substr(last_dot + 1)};
}

std::string ClassPath::relative_file() const {
  std::string file = module;
  std::ranges::replace(file, '.', '/');
  return file + ".so";
}

std::string detail::class_path_of(const std::type_info& type) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(type.name(), nullptr, nullptr, &status),
                                                         &std::free);
  std::string path = status == 0 ? name.get() : type.name();
  for (std::size_t at = path.find("::"); at != std::string::npos; at = path.find("::", at)) path.replace(at, 2, ".");
  return path;
}

}  // namespace ditattn
