#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>

#include "core/json_fields.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/planner.hpp"

namespace ditattn {
std::string_view planner_figures_json();  // embedded
}

namespace ditattn::planner {
namespace {

using nlohmann::json;

constexpr const char* kDocument = "Figures:";

std::string place_of(const char* what, const json& object, const char* key) {
  return fmt::format("{} {}", kDocument, label(what, object, key));
}

// Counts of a machine: what is beyond would overflow where times are sums of them.
int whole(const JsonFields& fields, const char* key) {
  const std::int64_t value = fields.count(key);
  if (value > 1'000'000)
    fields.fail(fmt::format("has '{}': {}, expected a whole number from 1 to 1000000", key, value));
  return static_cast<int>(value);
}

KernelFigures parse_kernel(const json& object, const JsonFields& gpu) {
  const JsonFields fields(object, fmt::format("{}, {}", gpu.place(), label("kernel", object, "backend")),
                          {"backend", "tflops", "extra_keys", "call_us", "tiles", "source"});
  KernelFigures kernel{.backend = fields.text("backend"),
                       .tflops = {},
                       .extra_keys = fields.number("extra_keys", 0, true),
                       .call_us = fields.number("call_us", 0, true),
                       .tiles = {},
                       .source = fields.text("source")};
  for (const json& pair : fields.list("tflops")) {
    if (!pair.is_array() || pair.size() != 2) fields.fail("has 'tflops' that are no [head size, TFLOP/s]");
    kernel.tflops.emplace_back(fields.number_in(pair[0], "tflops", 0, false),
                               fields.number_in(pair[1], "tflops", 0, false));
  }
  std::ranges::sort(kernel.tflops);
  for (const json& tile : fields.list("tiles")) {
    const JsonFields own(tile, fmt::format("{}, a tile", fields.place()), {"rows", "cost"});
    kernel.tiles.push_back({whole(own, "rows"), own.number("cost")});
  }
  return kernel;
}

GpuFigures parse_gpu(const json& object) {
  const JsonFields fields(object, place_of("gpu", object, "name"),
                          {"name", "units", "copy_gb_per_s", "copy_us", "source", "kernels"});
  GpuFigures gpu{.name = fields.text("name"),
                 .units = whole(fields, "units"),
                 .copy_gb_per_s = fields.number("copy_gb_per_s"),
                 .copy_us = fields.number("copy_us", 0, true),
                 .source = fields.text("source"),
                 .kernels = {}};
  for (const json& kernel : fields.list("kernels")) gpu.kernels.push_back(parse_kernel(kernel, fields));
  return gpu;
}

LinkFigures parse_link(const json& object) {
  const JsonFields fields(object, place_of("link", object, "name"),
                          {"name", "gb_per_s", "latency_us", "hidden", "copy_engines", "source"});
  LinkFigures link{.name = fields.text("name"),
                   .gb_per_s = fields.number("gb_per_s"),
                   .latency_us = fields.number("latency_us", 0, true),
                   .hidden = fields.number("hidden", 0, true),
                   .copy_engines = fields.flag("copy_engines"),
                   .source = fields.text("source")};
  if (link.hidden > 1) fields.fail(fmt::format("has 'hidden': {}, expected a share from 0 to 1", link.hidden));
  return link;
}

}  // namespace

Figures parse_figures(std::string_view text) {
  json document;
  try {
    document = json::parse(text);
  } catch (const json::exception& error) {
    throw ValueError(fmt::format("{} not JSON: {}", kDocument, error.what()));
  }
  const JsonFields fields(document, fmt::format("{} the document", kDocument),
                          {"gpus_per_node", "node_link", "gpus", "links"});
  Figures figures{
      .gpus_per_node = whole(fields, "gpus_per_node"), .node_link = fields.text("node_link"), .gpus = {}, .links = {}};
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
