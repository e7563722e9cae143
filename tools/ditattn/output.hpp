#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <string_view>

namespace ditattn::cli {

/// Keeps fields in the order they are written.
using Json = nlohmann::ordered_json;

/// Writes to stdout and makes sure that it arrived: FileError otherwise (a full disk must not look like success).
void print(std::string_view text);

/// Writes "ditattn: error: ", `text` as `printable` has it, and a newline to stderr. Where nothing can be written
/// there, the exit status alone tells: it throws nothing.
void print_error(std::string_view text);

/// One JSON document and a newline. Numbers that JSON does not have become null, broken UTF-8 is replaced.
std::string json_text(const Json& document);

/// Writes `json_text` to stdout.
void print_json(const Json& document);

/// True where stdout is a terminal and NO_COLOR (no-color.org) is unset or empty.
bool use_colour();

/// `text` with '?' for control characters (but newlines) and broken UTF-8: names from files must not command the
/// terminal.
std::string printable(std::string_view text);

}  // namespace ditattn::cli
