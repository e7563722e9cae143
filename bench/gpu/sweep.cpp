// Times the tiles of sweep_tiles.hpp beside those that the library takes on Hopper: what kFlashSm90Tiles should be.
//
//     ditattn_gpu_sweep [SHAPE]...   names of kShapes (all, without arguments) or B,H,Sq,Skv,D[,causal]
//
// Inputs are bfloat16 standard normals in (B, S, H, D) memory. A time is that of a graph of many launches, by CUDA
// events, per launch: the median of rounds in which the tiles' order changes. TFLOP/s = 4·B·H·Sq·Skv·D / time (half
// when causal); a ratio is the time of the library's tile over the tile's, above 1 where that is faster.

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iterator>
#include <memory>
#include <random>
#include <regex>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/gpu/device_clock.hpp"
#include "bench/gpu/sweep_tiles.hpp"
#include "kernels/cuda/flash_layout.hpp"

namespace {

using namespace ditattn::kernels;
using namespace ditattn::kernels::cuda;
using ditattn::bench::check;
using ditattn::bench::Clock;
using ditattn::bench::Graph;
using ditattn::bench::Owned;

constexpr int kRounds = 15;
constexpr float kGraphMs = 20;  // if launches took as long in it as one by one; less where the host is the slower
constexpr double kMostError = 1e-2;

struct Shape {
  std::string name;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t rows = 0;
  std::int64_t keys = 0;
  std::int64_t head_size = 0;
  bool causal = false;
};

// Those of inputs.py.
const std::vector<Shape> kShapes{
    {"flux-1024", 1, 24, 4608, 4608, 128},     {"sd3-1024", 2, 24, 4250, 4250, 64},
    {"qwen-image", 2, 24, 4352, 4352, 128},    {"wan1.3b-480p", 1, 12, 32760, 32760, 128},
    {"wan14b-480p", 1, 40, 32760, 32760, 128}, {"wan14b-720p", 1, 40, 75600, 75600, 128},
    {"wan14b-cross", 1, 40, 32760, 512, 128},  {"hunyuan-16k", 1, 24, 16384, 16384, 128},
    {"ltx-d64", 1, 32, 12288, 12288, 64},      {"cogvideox-d64", 2, 48, 17776, 17776, 64},
    {"d96-8k", 1, 16, 8192, 8192, 96},         {"d256-8k", 1, 16, 8192, 8192, 256},
    {"sit-d72", 8, 16, 256, 256, 72},          {"dit-xl-d72-cfg", 2, 16, 1024, 1024, 72},
    {"tiny-launch", 1, 8, 128, 128, 64},       {"causal-16k", 1, 24, 16384, 16384, 128, true},
};

Shape parse_shape(const std::string& text) {
  for (const Shape& known : kShapes) {
    if (known.name == text) return known;
  }
  const std::regex numbers(R"(([1-9]\d{0,6}),([1-9]\d{0,6}),([1-9]\d{0,6}),([1-9]\d{0,6}),([1-9]\d{0,6})(,causal)?)");
  std::smatch found;
  if (!std::regex_match(text, found, numbers)) {
    std::string names;
    for (const Shape& known : kShapes) names += " " + known.name;
    throw std::runtime_error("no shape '" + text + "': it may be B,H,Sq,Skv,D[,causal] or one of" + names);
  }
  const auto number = [&](std::size_t i) { return std::stoll(found[i]); };
  return {"problem", number(1), number(2), number(3), number(4), number(5), found[6].matched};
}

/// Elements of bfloat16, as bits, in device memory.
class Elements {
 public:
  explicit Elements(std::int64_t count) : count_(static_cast<std::size_t>(count)) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes()), "cudaMalloc");
    memory_.reset(memory);
  }

  void* data() const { return memory_.get(); }

  /// Standard normals, as power, and with it the clock, depends on the data: some, over and over.
  void fill(unsigned seed) {
    constexpr std::size_t most = (1 << 22) - 3;  // odd: rows of a tensor start at different ones
    std::vector<std::uint16_t> normals(std::min(count_, most));
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (std::uint16_t& x : normals) {
      x = static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(normal(generator)) + 0x8000) >> 16);
    }
    for (std::size_t done = 0; done < count_; done += normals.size()) {
      const std::size_t some = std::min(normals.size(), count_ - done);
      check(cudaMemcpy(static_cast<std::uint16_t*>(data()) + done, normals.data(), 2 * some, cudaMemcpyHostToDevice),
            "cudaMemcpy to the device");
    }
  }

  /// NaN: what is not written then shows.
  void spoil() { check(cudaMemset(data(), 0xFF, bytes()), "cudaMemset"); }

  std::vector<std::uint16_t> copy() const {
    std::vector<std::uint16_t> host(count_);
    check(cudaMemcpy(host.data(), data(), bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
    return host;
  }

 private:
  std::size_t bytes() const { return 2 * count_; }

  std::size_t count_;
  Owned<void*> memory_;
};

/// ‖got − expected‖ / ‖expected‖ of bfloat16.
double relative_error(std::span<const std::uint16_t> got, std::span<const std::uint16_t> expected) {
  const auto value = [](std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); };
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double e = value(expected[i]);
    const double d = value(got[i]) - e;
    difference += d * d;
    norm += e * e;
  }
  return std::sqrt(difference / norm);
}

struct Gpu {
  FlashDevice committed;  // of the library's kernels
  FlashDevice sweep;      // of the kernels of built_sweep
  Clock clock;
};

/// A kernel on one problem.
class Contender {
 public:
  Contender(const HopperKernel& kernel, FlashDevice& device, const AttentionProblem& problem)
      : kernel_(&kernel), device_(&device), problem_(&problem) {}

  const HopperKernel& kernel() const { return *kernel_; }

  void launch(const Clock& clock, int count = 1) const {
    for (int i = 0; i < count; ++i) launch_flash_sm90(*kernel_, *problem_, *device_, clock.stream());
  }

  void make_graph(const Clock& clock) {
    constexpr int few = 3;
    const float time = clock.milliseconds([&] { launch(clock, few); });
    launches_ = std::max(1, static_cast<int>(std::ceil(kGraphMs * few / time)));
    graph_ = Graph(clock, [&] { launch(clock, launches_); });
  }

  void measure(const Clock& clock) { times_.push_back(graph_.milliseconds(clock) / static_cast<float>(launches_)); }

  bool is_measured() const { return !times_.empty(); }

  /// Of a launch.
  double milliseconds() const {
    std::vector<double> sorted = times_;
    std::ranges::sort(sorted);
    return sorted[sorted.size() / 2];
  }

 private:
  const HopperKernel* kernel_;
  FlashDevice* device_;
  const AttentionProblem* problem_;
  int launches_ = 1;  // of the graph
  Graph graph_;
  std::vector<double> times_;  // one a round
};

AttentionProblem problem_of(const Shape& shape, const Elements& query, const Elements& key, const Elements& value,
                            const Elements& out) {
  const std::int64_t token = shape.heads * shape.head_size;
  const Strides query_strides{.batch = shape.rows * token, .token = token, .head = shape.head_size};
  const Strides key_strides{.batch = shape.keys * token, .token = token, .head = shape.head_size};
  AttentionProblem problem;
  problem.batch = shape.batch;
  problem.heads = problem.kv_heads = shape.heads;
  problem.rows = shape.rows;
  problem.keys = shape.keys;
  problem.head_size = shape.head_size;
  problem.type = problem.out_type = ElementType::bfloat16;
  problem.scale = 1 / std::sqrt(static_cast<float>(shape.head_size));
  problem.num_queries = problem.num_key_segments = 1;
  problem.queries[0].data = query.data();
  problem.queries[0].strides = query_strides;
  problem.key_segments[0].key = key.data();
  problem.key_segments[0].value = value.data();
  problem.key_segments[0].key_strides = problem.key_segments[0].value_strides = key_strides;
  problem.key_segments[0].keys = shape.keys;
  problem.out = out.data();
  problem.out_strides = query_strides;
  problem.causal = shape.causal;
  problem.causal_offset = shape.keys - shape.rows;
  return problem;
}

std::vector<std::uint16_t> output_of(const Contender& contender, const Clock& clock, Elements& out) {
  out.spoil();
  check(cudaDeviceSynchronize(), "cudaMemset");
  contender.launch(clock);
  check(cudaDeviceSynchronize(), "flash_sm90");
  return out.copy();
}

/// Time and rate of a launch, and the ratio to the library's.
std::string figures_of(const Contender& contender, const Contender& library, const Shape& shape) {
  const double ms = contender.milliseconds();
  const double work = 4.0 * static_cast<double>(shape.batch * shape.heads * shape.head_size) *
                      static_cast<double>(shape.rows * shape.keys) / (shape.causal ? 2 : 1);
  return fmt::format("{:9.5f} ms  {:6.1f} TFLOP/s  {:.3f}{}", ms, work / ms / 1e9, library.milliseconds() / ms,
                     &contender == &library ? "  the library's" : "");
}

/// Whether there are tiles and all give the same output.
bool sweep(const Shape& shape, Gpu& gpu) {
  fmt::print("\n{} {},{},{},{},{}{}\n", shape.name, shape.batch, shape.heads, shape.rows, shape.keys, shape.head_size,
             shape.causal ? ",causal" : "");
  const std::int64_t channels = shape.batch * shape.heads * shape.head_size;
  Elements query(channels * shape.rows);
  Elements key(channels * shape.keys);
  Elements value(channels * shape.keys);
  Elements out(channels * shape.rows);
  const AttentionProblem problem = problem_of(shape, query, key, value, out);
  FlashSm90Choice choice{.reason = why_not_flash(problem)};
  if (choice.reason == nullptr) choice = choose_flash_sm90(problem, gpu.committed.multiprocessors);
  if (choice.kernel == nullptr) {
    fmt::print("  not timed: {}\n", choice.reason);
    return false;
  }
  query.fill(1);
  key.fill(2);
  value.fill(3);

  std::vector<Contender> contenders;
  contenders.emplace_back(*choice.kernel, gpu.committed, problem);
  for (const HopperKernel& kernel : built_sweep()) {
    if (kernel.tile.head_size == choice.kernel->tile.head_size) contenders.emplace_back(kernel, gpu.sweep, problem);
  }
  const Contender& library = contenders[0];
  const std::vector<std::uint16_t> expected = output_of(library, gpu.clock, out);
  std::vector<double> errors;
  std::vector<Contender*> order;
  for (Contender& contender : contenders) {
    errors.push_back(relative_error(output_of(contender, gpu.clock, out), expected));
    if (!(errors.back() < kMostError)) continue;  // NaN too
    contender.make_graph(gpu.clock);
    order.push_back(&contender);
  }
  std::mt19937 generator(1);
  for (int round = 0; round < kRounds; ++round) {
    std::ranges::shuffle(order, generator);  // who follows a light kernel finds a cool GPU: not always the same
    for (Contender* contender : order) contender->measure(gpu.clock);
  }
  for (std::size_t i = 0; i < contenders.size(); ++i) {
    const Contender& contender = contenders[i];
    const HopperTile& tile = contender.kernel().tile;
    fmt::print("  {:<24} {:4} KiB  error {:.1e}  {}\n",
               fmt::format("{{{}, {}, {}, {}, {}}}", tile.head_size, tile.warpgroups, tile.keys, tile.stages,
                           tile.row_percent),
               contender.kernel().shared_bytes / 1024, errors[i],
               contender.is_measured() ? figures_of(contender, library, shape) : "not timed: the error is too large");
  }
  std::fflush(stdout);
  return order.size() == contenders.size();
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<Shape> shapes;
  for (int i = 1; i < argc; ++i) shapes.push_back(parse_shape(argv[i]));
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  if (properties.major != 9 || properties.minor != 0) {
    throw std::runtime_error(fmt::format("flash_sm90 needs a GPU of compute capability 9.0; {} has {}.{}",
                                         properties.name, properties.major, properties.minor));
  }
  fmt::print("{}, {} of {} tiles, medians of {} rounds; error: relative L2 distance from the library's output\n",
             properties.name, built_sweep().size(), std::size(kSweepTiles), kRounds);
  Gpu gpu;
  gpu.committed.multiprocessors = gpu.sweep.multiprocessors = properties.multiProcessorCount;
  bool all_agree = true;
  for (const Shape& shape : shapes.empty() ? kShapes : shapes) all_agree = sweep(shape, gpu) && all_agree;
  return all_agree ? 0 : 1;
} catch (const std::exception& error) {
  fmt::print(stderr, "ditattn_gpu_sweep: {}\n", error.what());
  return 1;
}
