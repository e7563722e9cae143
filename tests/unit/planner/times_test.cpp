// The planner's times on figures so simple that they can be worked out by hand.

#include "planner/times.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/unit/testing.hpp"

namespace ditattn::planner {
namespace {

using ditattn::testing::error_text;
using ditattn::testing::expect_contains;
using parallel::Mesh;

// One multiprocessor of 1 TFLOP/s, tiles of one row, copies that take no time.
Figures simple_figures(double gb_per_s, double latency_us = 0) {
  const KernelFigures kernel{.backend = "FLASH_ATTN",
                             .tflops = {{64, 1}, {128, 2}},
                             .extra_keys = 0,
                             .call_us = 0,
                             .tiles = {{1, 1}},
                             .source = "made up"};
  const GpuFigures gpu{
      .name = "H200", .units = 1, .copy_gb_per_s = 1e9, .copy_us = 0, .source = "made up", .kernels = {kernel}};
  return {.gpus_per_node = 8,
          .node_link = "nvlink",
          .gpus = {gpu},
          .links = {{"nvlink", gb_per_s, latency_us, 1, false, "made up"},
                    {"ib", gb_per_s / 10, latency_us, 1, false, "made up"}}};
}

Request request_of(int gpus, std::int64_t rows, std::int64_t keys, std::int64_t heads = 8) {
  return {.problem = {.num_heads = heads,
                      .num_kv_heads = heads,
                      .seq_q = rows,
                      .seq_kv = keys,
                      .head_size = 64,
                      .dtype = kBFloat16},
          .gpus = gpus};
}

const MeshPlan& at(const Plan& plan, const Mesh& mesh) {
  return *std::ranges::find(plan.meshes, mesh, &MeshPlan::mesh);
}

double attention_ms(std::int64_t heads, double pairs) { return static_cast<double>(heads) * pairs * 4 * 64 * 1e-9; }

TEST(PlannerTimes, OneGpu) {
  const Plan plan = make_plan(request_of(1, 1000, 500), simple_figures(1));
  ASSERT_EQ(plan.meshes.size(), 1U);
  EXPECT_NEAR(plan.one_gpu_ms, attention_ms(8, 1000 * 500), 1e-9);
  EXPECT_DOUBLE_EQ(plan.meshes[0].ms, plan.one_gpu_ms);
  EXPECT_EQ(plan.meshes[0].sent_bytes, 0);
}

TEST(PlannerTimes, TilesRoundsAndHeadSizes) {
  Figures figures = simple_figures(1);
  KernelFigures& kernel = figures.gpus[0].kernels[0];
  figures.gpus[0].units = 10;
  kernel.tiles = {{100, 1}, {50, 1.2}};
  kernel.extra_keys = 20;
  kernel.call_us = 7;
  // 8 heads of 110 rows: 16 tiles of 100, two rounds of 10, or 24 of 50, three rounds. A multiprocessor has 0.1
  // TFLOP/s.
  const double large = 2 * 100 * 4.0 * 520 * 64 / 0.1e12;
  const double small = 3 * 50 * 1.2 * 4.0 * 520 * 64 / 0.1e12;
  const Plan plan = make_plan(request_of(1, 110, 500), figures);
  EXPECT_NEAR(plan.one_gpu_ms, std::min(large, small) * 1e3 + 0.007, 1e-9);
  Request other = request_of(1, 110, 500);
  other.problem.head_size = 96;  // halfway: 1.5 TFLOP/s
  EXPECT_NEAR(make_plan(other, figures).one_gpu_ms, std::min(large, small) * 1e3 + 0.007, 1e-9);
}

// The exchange of a ring hides behind attention where that takes longer, and not where it does not.
TEST(PlannerTimes, RingHidesWhatFits) {
  const double step_ms = attention_ms(8, 250 * 250);
  const double bytes = 2.0 * 250 * 8 * 64 * 2;
  const auto message_ms = [&](double gb_per_s) { return bytes / gb_per_s * 1e-6; };
  const Plan fast = make_plan(request_of(4, 1000, 1000), simple_figures(1000));
  ASSERT_LT(message_ms(1000), step_ms);
  EXPECT_NEAR(at(fast, {.ring = 4}).ms, 4 * step_ms, 1e-6);
  EXPECT_NEAR(at(fast, {.ring = 4}).exchange_ms, 0, 1e-6);
  const Plan slow = make_plan(request_of(4, 1000, 1000), simple_figures(1));
  ASSERT_GT(message_ms(1), step_ms);
  EXPECT_NEAR(at(slow, {.ring = 4}).ms, 3 * message_ms(1) + step_ms, 1e-6);
  EXPECT_NEAR(at(slow, {.ring = 4}).exchange_ms, 3 * (message_ms(1) - step_ms), 1e-6);
  // Gathered at once nothing is hidden, and each sends its chunk to three.
  EXPECT_NEAR(at(slow, {.allgather = 4}).ms, 3 * message_ms(1) + 4 * step_ms, 1e-6);
}

// A kernel that leaves no room hides a share of what is shorter, the exchange or itself.
TEST(PlannerTimes, AShareOfTheShorterIsHidden) {
  const double step_ms = attention_ms(8, 500 * 500);
  for (const double gb_per_s : {1000.0, 1.0}) {
    Figures figures = simple_figures(gb_per_s);
    figures.links[0].hidden = 0.25;
    const double message_ms = 2.0 * 500 * 8 * 64 * 2 / gb_per_s * 1e-6;
    const MeshPlan ring = at(make_plan(request_of(2, 1000, 1000), figures), {.ring = 2});
    EXPECT_NEAR(ring.exchange_ms, message_ms - 0.25 * std::min(message_ms, step_ms), 1e-6);
    EXPECT_NEAR(ring.attention_ms, 2 * step_ms, 1e-9);
  }
}

// Two parts are read and one written, in 16 bits; from the third on sums are float32. Ulysses copies all heads twice,
// Q, K and V in one go, the result in another; rings and gathering do not, but a batch's keys.
TEST(PlannerTimes, CopiesByHand) {
  Figures figures = simple_figures(1e9);
  figures.gpus[0].copy_gb_per_s = 1;
  figures.gpus[0].copy_us = 1;
  const auto copying_ms = [&](int gpus, const Mesh& mesh, std::int64_t batch) {
    Request request = request_of(gpus, 1200, 1200);
    request.problem.batch = batch;
    return at(make_plan(request, figures), mesh).copying_ms;
  };
  const double mine = 8 * 64 * 1e-6;  // milliseconds of a row's bytes, were an element one
  EXPECT_NEAR(copying_ms(2, {.ring = 2}, 1), 600 * mine * (2 + 2 + 2) + 0.001, 1e-9);
  EXPECT_NEAR(copying_ms(4, {.ring = 4}, 1), 300 * mine * ((2 + 2 + 4) + (2 + 4 + 4) + (2 + 4 + 2)) + 0.003, 1e-9);
  EXPECT_NEAR(copying_ms(2, {.allgather = 2}, 1), 600 * mine * (4 + 4) + 0.001, 1e-9);
  EXPECT_NEAR(copying_ms(2, {.ulysses = 2}, 1), 600 * mine * 4 * (3 + 1) + 0.002, 1e-9);
  EXPECT_NEAR(copying_ms(2, {.ring = 2}, 2), 2 * (600 * mine * (6 + 8)) + 0.002, 1e-9);
}

TEST(PlannerTimes, UlyssesShowsItsExchange) {
  // Of 1000 rows and keys each rank has 250 of 8 heads; six of the heads go to others, for four tensors, Q, K and V at
  // once.
  const double bytes = 4.0 * 250 * 6 * 64 * 2;
  const Plan plan = make_plan(request_of(4, 1000, 1000), simple_figures(10, 3));
  EXPECT_NEAR(at(plan, {.ulysses = 4}).exchange_ms, bytes / 10 * 1e-6 + 2 * 0.003, 1e-6);
  EXPECT_NEAR(at(plan, {.ulysses = 4}).attention_ms, attention_ms(2, 1000 * 1000), 1e-9);
}

// Two ranks of four heads each, of which the first and the last are parts of their own: these show, the rest hides
// behind attention; nothing is put together, and only what came last is copied to its place afterwards.
TEST(PlannerTimes, CopyEnginesCarryPartsBesideAttention) {
  Figures figures = simple_figures(100, 3);
  figures.links[0].copy_engines = true;
  figures.gpus[0].copy_gb_per_s = 1000;
  const double tensor = 500 * 4 * 64 * 2;  // bytes to the other rank of one of Q, K, V and the result
  const MeshPlan ulysses = at(make_plan(request_of(2, 1000, 1000), figures), {.ulysses = 2});
  EXPECT_NEAR(ulysses.exchange_ms, (3 + 1) * tensor / 4 / 100 * 1e-6 + 2 * 0.003, 1e-9);
  EXPECT_NEAR(ulysses.copying_ms, 2 * tensor / 4 / 1000 * 1e-6, 1e-9);
  EXPECT_NEAR(ulysses.attention_ms, attention_ms(4, 1000 * 1000), 1e-9);
  // Where keys are shared out too, all heads go at once; between nodes they are put together as well.
  const MeshPlan both = at(make_plan(request_of(4, 1000, 1000), figures), {.ulysses = 2, .ring = 2});
  EXPECT_NEAR(both.exchange_ms, (3 + 1) * (tensor / 2) / 100 * 1e-6 + 2 * 0.003, 1e-9);
  Request apart = request_of(2, 1000, 1000);
  apart.link = "ib";
  EXPECT_NEAR(at(make_plan(apart, figures), {.ulysses = 2}).exchange_ms, (3 + 1) * tensor / 10 * 1e-6 + 2 * 0.003,
              1e-9);
}

TEST(PlannerTimes, TheSlowestRankCounts) {
  const Plan uneven = make_plan(request_of(4, 1000, 1000, 6), simple_figures(1e9));
  EXPECT_NEAR(at(uneven, {.ulysses = 4}).attention_ms, attention_ms(2, 1000 * 1000), 1e-9);  // 2, 2, 1, 1 heads
  expect_contains(at(uneven, {.ulysses = 4}).notes.at(0), {"2 on the slowest ranks, 1.5 on average"});
  Request causal = request_of(4, 1000, 1000);
  causal.problem.causal = true;
  // The last place: three whole chunks and the triangle of its own.
  const double last = 3 * 250.0 * 250 + 250.0 * 251 / 2;
  EXPECT_NEAR(at(make_plan(causal, simple_figures(1e9)), {.ring = 4}).attention_ms, attention_ms(8, last), 1e-9);
}

TEST(PlannerTimes, NodesKeepUlyssesInside) {
  const Request sixteen = [] {
    Request request = request_of(16, 16000, 16000, 16);
    request.link = "ib";
    return request;
  }();
  const Plan plan = make_plan(sixteen, simple_figures(100));
  EXPECT_EQ(plan.gpus_per_node, 8);
  const double mine = 1000.0 * 64 * 2;  // a head of this rank's tokens
  // ulysses=8: inside. 7 of 8 shares of 16 heads, four tensors.
  const auto phase = [&](double heads, double gb_per_s) { return 4 * mine * heads / gb_per_s * 1e-6; };
  const MeshPlan& inside = at(plan, {.ulysses = 8, .ring = 2});
  EXPECT_NEAR(inside.exchange_ms, phase(14, 100), 1e-5);
  EXPECT_TRUE(inside.notes.empty());
  // ulysses=16: eight of sixteen heads cross, ten times as slowly.
  const MeshPlan& across = at(plan, {.ulysses = 16});
  EXPECT_NEAR(across.exchange_ms, phase(8, 10), 1e-5);
  expect_contains(across.notes.at(0), {"ulysses crosses nodes of 8"});
  Request eight = request_of(8, 16000, 16000, 16);
  eight.link = "ib";
  EXPECT_EQ(make_plan(eight, simple_figures(100)).gpus_per_node, 1);
}

TEST(PlannerTimes, VisiblePairsAreThoseOfEveryRow) {
  std::mt19937_64 random(5);
  const auto number = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  for (int i = 0; i < 2000; ++i) {
    const Work work{.rows = number(1, 30), .keys = number(1, 30), .text = number(0, 3), .causal = number(0, 3) > 0};
    const auto range = [&](std::int64_t total) {
      const std::int64_t begin = number(0, total);
      return Range{begin, number(begin, total)};
    };
    const Range rows = range(work.rows + work.text);
    const Range keys = range(work.keys + work.text);
    std::int64_t seen = 0;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      for (std::int64_t key = keys.begin; key < keys.end; ++key) {
        seen += !work.causal || key <= row + work.keys - work.rows ? 1 : 0;
      }
    }
    ASSERT_EQ(visible_pairs(work, rows, keys), static_cast<double>(seen)) << i;
  }
}

TEST(PlannerTimes, EveryMeshOnceTheFastestFirst) {
  const Plan plan = make_plan(request_of(6, 600, 600), figures());
  std::vector<std::string> names;
  for (const MeshPlan& mesh : plan.meshes) {
    names.push_back(mesh_name(mesh.mesh));
    EXPECT_NEAR(mesh.ms, mesh.attention_ms + mesh.copying_ms + mesh.exchange_ms, 1e-9);
    EXPECT_GT(mesh.workspace_bytes, 0);
  }
  EXPECT_TRUE(std::ranges::is_sorted(plan.meshes, {}, &MeshPlan::ms));
  std::ranges::sort(names);
  EXPECT_EQ(names, (std::vector<std::string>{"allgather=6", "ring=6", "ulysses=2, allgather=3", "ulysses=2, ring=3",
                                             "ulysses=3, allgather=2", "ulysses=3, ring=2", "ulysses=6"}));
  expect_contains(explain_best(plan), {mesh_name(plan.meshes[0].mesh), mesh_name(plan.meshes[1].mesh), "more:"});
}

TEST(PlannerTimes, Refusals) {
  const auto error = [](const auto& change) {
    Request request = request_of(2, 100, 100);
    change(request);
    return error_text<ValueError>([&] { make_plan(request, figures()); });
  };
  expect_contains(error([](Request& r) { r.gpus = 0; }), {"0 GPUs", "1 to 1024"});
  expect_contains(error([](Request& r) { r.gpus = 5000; }), {"5000 GPUs", "1 to 1024"});
  expect_contains(error([](Request& r) { r.link = "ethernet"; }), {"'ethernet'", "nvlink, ib"});
  expect_contains(error([](Request& r) { r.gpu = "B200"; }), {"'B200'", "H200"});
  expect_contains(error([](Request& r) { r.backend = "NONE"; }), {"'NONE'", "FLASH_ATTN"});
  expect_contains(error([](Request& r) { r.gpus = 16; }), {"nvlink joins the 8 GPUs of a node, not 16"});
  expect_contains(error([](Request& r) { r.gpus_per_node = 0; }), {"0 GPUs per node"});
  expect_contains(error([](Request& r) { r.joint_tokens = 101; }), {"101 joint tokens", "0 to 100"});
  expect_contains(error([](Request& r) { r.problem.num_kv_heads = 3; }), {"8 heads, 3 K/V heads"});
  expect_contains(error([](Request& r) { r.problem.seq_q = 0; }), {"0 rows", "at least 1"});
}

}  // namespace
}  // namespace ditattn::planner
