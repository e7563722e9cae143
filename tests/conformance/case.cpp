#include "tests/conformance/case.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <functional>
#include <sstream>
#include <stdexcept>

namespace ditattn::conformance {
namespace {

// Names of the enumerators, in their order.
const std::vector<std::string> kMasks = {"none",          "prefix",        "padding",        "all_true",   "bool_qk",
                                         "bool_bhqk",     "bool_head",     "bool_head_keys", "bool_batch", "additive",
                                         "additive_head", "additive_keys", "empty_rows"};
const std::vector<std::string> kNans = {"none", "hidden", "some_rows"};
const std::vector<std::string> kLayouts = {"contiguous", "bhsd", "packed", "padded", "expanded", "reversed"};
const std::vector<std::string> kInputs = {"normal", "outlier", "offset", "huge", "tiny"};
const std::vector<std::string> kBools = {"0", "1"};
const std::vector<std::string> kOuts = {"none", "given"};

template <class Number>
Number parse_number(const std::string& text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw std::runtime_error(fmt::format("'{}' is not a number", text));
  }
  return value;
}

template <class Enum>
Enum parse_name(const std::string& text, const std::vector<std::string>& names) {
  const auto found = std::ranges::find(names, text);
  if (found == names.end()) {
    throw std::runtime_error(fmt::format("'{}' is not one of {}", text, fmt::join(names, ", ")));
  }
  return static_cast<Enum>(found - names.begin());
}

void parse_heads(Case& c, const std::string& text) {
  const std::size_t slash = text.find('/');
  if (slash == std::string::npos) throw std::runtime_error(fmt::format("'{}' is not heads/kv_heads", text));
  c.heads = parse_number<std::int64_t>(text.substr(0, slash));
  c.kv_heads = parse_number<std::int64_t>(text.substr(slash + 1));
}

using Setter = std::function<void(Case&, const std::string&)>;

const std::map<std::string, Setter>& setters() {
  static const std::map<std::string, Setter> table = {
      {"B", [](Case& c, const std::string& v) { c.batch = parse_number<std::int64_t>(v); }},
      {"heads", parse_heads},
      {"Sq", [](Case& c, const std::string& v) { c.seq_q = parse_number<std::int64_t>(v); }},
      {"Skv", [](Case& c, const std::string& v) { c.seq_kv = parse_number<std::int64_t>(v); }},
      {"D", [](Case& c, const std::string& v) { c.head_size = parse_number<std::int64_t>(v); }},
      {"dtype", [](Case& c, const std::string& v) { c.dtype = parse_dtype(v); }},
      {"mask", [](Case& c, const std::string& v) { c.mask = parse_name<MaskCase>(v, kMasks); }},
      {"nan", [](Case& c, const std::string& v) { c.nan = parse_name<NanCase>(v, kNans); }},
      {"causal", [](Case& c, const std::string& v) { c.causal = parse_name<bool>(v, kBools); }},
      {"scale",
       [](Case& c, const std::string& v) {
         if (v != "default") c.scale = parse_number<double>(v);
       }},
      {"layout", [](Case& c, const std::string& v) { c.layout = parse_name<Layout>(v, kLayouts); }},
      {"out", [](Case& c, const std::string& v) { c.out_given = parse_name<bool>(v, kOuts); }},
      {"lse", [](Case& c, const std::string& v) { c.lse = parse_name<bool>(v, kBools); }},
      {"input", [](Case& c, const std::string& v) { c.input = parse_name<Input>(v, kInputs); }},
  };
  return table;
}

// Calls use(line) for every line of a file of `cases/` that is not empty once its comment is cut off.
void for_each_line(const std::string& file, const std::function<void(const std::string&)>& use) {
  const std::filesystem::path path = std::filesystem::path(DITATTN_CONFORMANCE_CASES) / file;
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error("cannot read " + path.string());
  std::string line;
  for (int number = 1; std::getline(stream, line); ++number) {
    line = line.substr(0, line.find('#'));
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      use(line);
    } catch (const std::exception& error) {
      throw std::runtime_error(fmt::format("{}:{}: {}", path.string(), number, error.what()));
    }
  }
}

}  // namespace

double Case::softmax_scale() const { return scale.value_or(1 / std::sqrt(static_cast<double>(head_size))); }

std::map<std::string, std::string> split_fields(const std::string& line) {
  std::map<std::string, std::string> fields;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos) throw std::runtime_error(fmt::format("'{}' is not field=value", word));
    if (!fields.emplace(word.substr(0, equals), word.substr(equals + 1)).second) {
      throw std::runtime_error(fmt::format("field '{}' comes twice", word.substr(0, equals)));
    }
  }
  return fields;
}

Case parse_case(const std::string& line) {
  Case result;
  result.line = line;
  for (const auto& [field, value] : split_fields(line)) {
    const auto setter = setters().find(field);
    if (setter == setters().end()) throw std::runtime_error(fmt::format("unknown field '{}'", field));
    try {
      setter->second(result, value);
    } catch (const std::exception& error) {
      throw std::runtime_error(fmt::format("{}: {}", field, error.what()));
    }
  }
  return result;
}

std::vector<Case> load_cases(const std::string& name) {
  std::vector<Case> cases;
  for_each_line(name + ".txt", [&](const std::string& line) { cases.push_back(parse_case(line)); });
  return cases;
}

Space load_space() {
  Space space;
  for_each_line("space.txt", [&](const std::string& line) {
    std::istringstream words(line);
    Space::Field field;
    words >> field.name;
    field.in_full_product = field.name.ends_with('*');
    if (field.in_full_product) field.name.pop_back();
    for (std::string value; words >> value;) field.values.push_back(value);
    space.fields.push_back(std::move(field));
  });
  return space;
}

}  // namespace ditattn::conformance
