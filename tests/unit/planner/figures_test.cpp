// The file of figures: what it may hold, and that a broken one is told by its place.

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "ditattn/planner.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn::planner {
namespace {

using ditattn::testing::error_text;
using ditattn::testing::expect_contains;
using nlohmann::json;

TEST(PlannerFigures, TheEmbeddedOnesSayWhereTheyComeFrom) {
  for (const GpuFigures& gpu : figures().gpus) {
    EXPECT_FALSE(gpu.source.empty());
    for (const KernelFigures& kernel : gpu.kernels) EXPECT_FALSE(kernel.source.empty());
  }
  for (const char* name : {"nvlink", "ib"}) {
    EXPECT_EQ(std::ranges::count(figures().links, name, &LinkFigures::name), 1) << name;
  }
  const auto ib = std::ranges::find(figures().links, "ib", &LinkFigures::name);
  expect_contains(ib->source, {"specification, not measured"});
}

TEST(PlannerFigures, BrokenOnesAreToldByPlace) {
  struct Break {
    const char* pointer;
    json value;
    std::vector<std::string> words;
  };
  const std::vector<Break> breaks = {
      {"/links/0/gb_per_s", 0, {"link 'nvlink'", "'gb_per_s': 0", "a number above 0"}},
      {"/links/1/latency_us", "20", {"link 'ib'", "'latency_us': \"20\"", "from 0"}},
      {"/links/0/speed", 1, {"unknown field 'speed'", "latency_us"}},
      {"/links", json::array(), {"'links': []", "a list with entries"}},
      {"/node_link", "pcie", {"'pcie'", "none of its links"}},
      {"/gpus_per_node", 2.5, {"'gpus_per_node': 2.5", "a whole number above 0"}},
      {"/gpus/0/units", -1, {"gpu 'H200'", "'units': -1"}},
      {"/gpus/0/kernels/0/tflops/0", 64, {"gpu 'H200', kernel 'FLASH_ATTN'", "[head size, TFLOP/s]"}},
      {"/links/0/hidden", 1.5, {"link 'nvlink'", "'hidden': 1.5", "a share from 0 to 1"}},
      {"/links/0/copy_engines", 1, {"link 'nvlink'", "'copy_engines': 1"}},
      {"/gpus/0/kernels/0/tiles/0/rows", 0, {"a tile", "'rows': 0"}},
      {"/gpus/0/source", "", {"'source': \"\"", "a text"}},
      {"/gpus/0", 3, {"gpu without a name", "is no object"}},
  };
  for (const Break& one : breaks) {
    json document = json::parse(figures_json());
    document[json::json_pointer(one.pointer)] = one.value;
    expect_contains(error_text<ValueError>([&] { parse_figures(document.dump()); }), one.words);
  }
  json document = json::parse(figures_json());
  document["links"][1].erase("gb_per_s");
  expect_contains(error_text<ValueError>([&] { parse_figures(document.dump()); }), {"link 'ib'", "lacks the field"});
  expect_contains(error_text<ValueError>([] { parse_figures("{"); }), {"not JSON"});
}

}  // namespace
}  // namespace ditattn::planner
