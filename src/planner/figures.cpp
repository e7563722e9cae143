#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "ditattn/errors.hpp"
#include "ditattn/planner.hpp"

namespace ditattn {
std::string_view planner_figures_json();  // embedded
}

namespace ditattn::planner {
namespace {

using nlohmann::json;

// One object with its place ("link 'ib'"), for messages. Keys that nothing reads would be misspelt ones.
class Fields {
 public:
  Fields(const json& object, std::string place, std::initializer_list<std::string_view> allowed)
      : object_(object), place_(std::move(place)) {
    if (!object.is_object()) fail("is no object");
    for (const auto& [key, value] : object.items()) {
      if (std::ranges::find(allowed, key) == allowed.end()) {
        fail(fmt::format("has an unknown field '{}'; it may have: {}", key, fmt::join(allowed, ", ")));
      }
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw ValueError(fmt::format("Figures: {} {}.", place_, what));
  }

  [[nodiscard]] const json& at(const char* key) const {
    const auto found = object_.find(key);
    if (found == object_.end()) fail(fmt::format("lacks the field '{}'", key));
    return *found;
  }

  [[nodiscard]] std::string text(const char* key) const {
    const json& value = at(key);
    if (!value.is_string() || value.get_ref<const std::string&>().empty()) fail(wrong(key, value, "a text"));
    return value.get<std::string>();
  }

  /// Above `lowest`, or `lowest` too where `is_inclusive`.
  [[nodiscard]] double number(const char* key, double lowest = 0, bool is_inclusive = false) const {
    return number_in(at(key), key, lowest, is_inclusive);
  }
  [[nodiscard]] double number_in(const json& value, const char* key, double lowest, bool is_inclusive) const {
    const double number = value.is_number() ? value.get<double>() : std::nan("");
    if (number > lowest || (is_inclusive && number == lowest)) return number;
    fail(wrong(key, value, fmt::format("a number {} {}", is_inclusive ? "from" : "above", lowest)));
  }
  [[nodiscard]] int whole(const char* key) const {
    const json& value = at(key);
    const bool is_whole = value.is_number_unsigned() && value.get<std::uint64_t>() <= 1'000'000;
    if (!is_whole || value == 0) fail(wrong(key, value, "a whole number from 1 to 1000000"));
    return value.get<int>();
  }

  [[nodiscard]] const json& list(const char* key) const {
    const json& value = at(key);
    if (!value.is_array() || value.empty()) fail(wrong(key, value, "a list with entries"));
    return value;
  }

 private:
  static std::string wrong(const char* key, const json& value, const std::string& expected) {
    return fmt::format("has '{}': {}, expected {}", key, value.dump(), expected);
  }

  const json& object_;
  std::string place_;
};

// "gpu 'H200'", of anything, as nothing is checked yet.
std::string label(const char* what, const json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return fmt::format("{} {}", what, found == object.end() ? "without a name" : found->dump());
}

KernelFigures parse_kernel(const json& object) {
  const Fields fields(object, label("kernel", object, "backend"),
                      {"backend", "tflops", "extra_keys", "call_us", "hidden", "tiles", "source"});
  KernelFigures kernel{.backend = fields.text("backend"),
                       .tflops = {},
                       .extra_keys = fields.number("extra_keys", 0, true),
                       .call_us = fields.number("call_us", 0, true),
                       .hidden = fields.number("hidden", 0, true),
                       .tiles = {},
                       .source = fields.text("source")};
  if (kernel.hidden > 1) fields.fail(fmt::format("has 'hidden': {}, expected a share from 0 to 1", kernel.hidden));
  for (const json& pair : fields.list("tflops")) {
    if (!pair.is_array() || pair.size() != 2) fields.fail("has 'tflops' that are no [head size, TFLOP/s]");
    kernel.tflops.emplace_back(fields.number_in(pair[0], "tflops", 0, false),
                               fields.number_in(pair[1], "tflops", 0, false));
  }
  std::ranges::sort(kernel.tflops);
  for (const json& tile : fields.list("tiles")) {
    const Fields own(tile, "a tile", {"rows", "cost"});
    kernel.tiles.push_back({own.whole("rows"), own.number("cost")});
  }
  return kernel;
}

GpuFigures parse_gpu(const json& object) {
  const Fields fields(object, label("gpu", object, "name"),
                      {"name", "units", "copy_gb_per_s", "copy_us", "source", "kernels"});
  GpuFigures gpu{.name = fields.text("name"),
                 .units = fields.whole("units"),
                 .copy_gb_per_s = fields.number("copy_gb_per_s"),
                 .copy_us = fields.number("copy_us", 0, true),
                 .source = fields.text("source"),
                 .kernels = {}};
  for (const json& kernel : fields.list("kernels")) gpu.kernels.push_back(parse_kernel(kernel));
  return gpu;
}

LinkFigures parse_link(const json& object) {
  const Fields fields(object, label("link", object, "name"), {"name", "gb_per_s", "latency_us", "source"});
  return {.name = fields.text("name"),
          .gb_per_s = fields.number("gb_per_s"),
          .latency_us = fields.number("latency_us", 0, true),
          .source = fields.text("source")};
}

}  // namespace

Figures parse_figures(std::string_view text) {
  json document;
  try {
    document = json::parse(text);
  } catch (const json::exception& error) {
    throw ValueError(fmt::format("Figures: not JSON: {}", error.what()));
  }
  const Fields fields(document, "the document", {"gpus_per_node", "node_link", "gpus", "links"});
  Figures figures{
      .gpus_per_node = fields.whole("gpus_per_node"), .node_link = fields.text("node_link"), .gpus = {}, .links = {}};
  for (const json& gpu : fields.list("gpus")) figures.gpus.push_back(parse_gpu(gpu));
  for (const json& link : fields.list("links")) figures.links.push_back(parse_link(link));
  if (std::ranges::find(figures.links, figures.node_link, &LinkFigures::name) == figures.links.end()) {
    fields.fail(fmt::format("has the node_link '{}', which is none of its links", figures.node_link));
  }
  return figures;
}

std::string_view figures_json() { return planner_figures_json(); }

const Figures& figures() {
  static const Figures all = parse_figures(figures_json());
  return all;
}

}  // namespace ditattn::planner
