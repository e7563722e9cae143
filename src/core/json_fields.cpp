#include "core/json_fields.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "ditattn/errors.hpp"

namespace ditattn {

using nlohmann::json;

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() > 100 ? text.substr(0, 100) + "…" : text;
}

std::string label(const char* what, const json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (found == object.end()) return fmt::format("{} without a name", what);
  return fmt::format("{} '{}'", what, found->is_string() ? found->get<std::string>() : shown(*found));
}

JsonFields::JsonFields(const json& object, std::string place, std::initializer_list<std::string_view> allowed)
    : object_(object), place_(std::move(place)) {
  if (!object.is_object()) fail("is no object");
  for (const auto& [key, value] : object.items()) {
    if (std::ranges::find(allowed, key) == allowed.end()) {
      fail(fmt::format("has an unknown field '{}'; it may have: {}", key, fmt::join(allowed, ", ")));
    }
  }
}

void JsonFields::fail(const std::string& what) const { throw ValueError(fmt::format("{} {}.", place_, what)); }

void JsonFields::fail_of(std::string_view key, const json& value, std::string_view expected) const {
  fail(fmt::format("has '{}': {}, expected {}", key, shown(value), expected));
}

const json& JsonFields::at(const char* key) const {
  const auto found = object_.find(key);
  if (found == object_.end()) fail(fmt::format("lacks the field '{}'", key));
  return *found;
}

std::string JsonFields::text(const char* key) const {
  const json& value = at(key);
  if (!value.is_string() || value.get_ref<const std::string&>().empty()) fail_of(key, value, "a text");
  return value.get<std::string>();
}

const json& JsonFields::list(const char* key) const {
  const json& value = at(key);
  if (!value.is_array() || value.empty()) fail_of(key, value, "a list with entries");
  return value;
}

bool JsonFields::flag(const char* key) const {
  const json& value = at(key);
  if (!value.is_boolean()) fail_of(key, value, "true or false");
  return value.get<bool>();
}

std::size_t JsonFields::choice(const char* key, std::initializer_list<std::string_view> allowed) const {
  const auto* found = std::ranges::find(allowed, text(key));
  if (found == allowed.end()) fail_of(key, at(key), fmt::format("one of: {}", fmt::join(allowed, ", ")));
  return static_cast<std::size_t>(found - allowed.begin());
}

std::string JsonFields::one_of(const char* key, std::initializer_list<std::string_view> allowed) const {
  return std::string(allowed.begin()[choice(key, allowed)]);
}

std::int64_t JsonFields::count_in(const json& value, std::string_view key) const {
  if (!value.is_number_integer() || value.get<std::int64_t>() < 1) fail_of(key, value, "a whole number above 0");
  return value.get<std::int64_t>();
}

double JsonFields::number_in(const json& value, std::string_view key, double lowest, bool is_inclusive) const {
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (number > lowest || (is_inclusive && number == lowest)) return number;
  fail_of(key, value, fmt::format("a number {} {}", is_inclusive ? "from" : "above", lowest));
}

}  // namespace ditattn
