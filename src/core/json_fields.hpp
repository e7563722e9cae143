#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace ditattn {

/// A value of a document for messages: as JSON, its first 100 characters. What is no UTF-8 (values given as flags or by
/// the environment) is replaced, where nlohmann's `dump` would throw.
std::string shown(const nlohmann::json& value);

/// "gpu 'H200'", "gpu without a name": an object's place for messages, of anything, as nothing is checked yet.
std::string label(const char* what, const nlohmann::json& object, const char* key);

/// One object of a document with its place ("model 'X', role 'self'"). Keys that nothing reads would be misspelt ones,
/// so every object states all it may have. Errors are `ValueError`s: the document, the place, the value, what is
/// allowed. Refers to the object.
class JsonFields {
 public:
  JsonFields(const nlohmann::json& object, std::string place, std::initializer_list<std::string_view> allowed);

  [[noreturn]] void fail(const std::string& what) const;

  [[nodiscard]] const std::string& place() const { return place_; }
  [[nodiscard]] bool has(const char* key) const { return object_.contains(key); }

  [[nodiscard]] const nlohmann::json& at(const char* key) const;
  /// With a character at least.
  [[nodiscard]] std::string text(const char* key) const;
  [[nodiscard]] std::string optional_text(const char* key) const { return has(key) ? text(key) : std::string{}; }
  /// With an entry at least.
  [[nodiscard]] const nlohmann::json& list(const char* key) const;
  [[nodiscard]] bool flag(const char* key) const;

  /// Index of a text among the allowed ones.
  [[nodiscard]] std::size_t choice(const char* key, std::initializer_list<std::string_view> allowed) const;
  /// The text itself, one of the allowed ones.
  [[nodiscard]] std::string one_of(const char* key, std::initializer_list<std::string_view> allowed) const;

  /// A whole number from 1 on.
  [[nodiscard]] std::int64_t count(const char* key) const { return count_in(at(key), key); }
  [[nodiscard]] std::int64_t count_in(const nlohmann::json& value, std::string_view key) const;

  /// Above `lowest`, or `lowest` too where `is_inclusive`.
  [[nodiscard]] double number(const char* key, double lowest = 0, bool is_inclusive = false) const {
    return number_in(at(key), key, lowest, is_inclusive);
  }
  [[nodiscard]] double number_in(const nlohmann::json& value, std::string_view key, double lowest,
                                 bool is_inclusive) const;

 private:
  [[noreturn]] void fail_of(std::string_view key, const nlohmann::json& value, std::string_view expected) const;

  const nlohmann::json& object_;
  std::string place_;
};

}  // namespace ditattn
