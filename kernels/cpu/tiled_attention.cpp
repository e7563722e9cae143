#include "kernels/cpu/tiled_attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "kernels/cpu/half.hpp"
#include "kernels/cpu/in_order.hpp"

namespace ditattn::kernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::size_t kKeptBytes = 64 << 20;
constexpr std::int64_t kPackedBytes = 48 << 20;  // of packed heads, over all threads

using Memory = std::unique_ptr<float, decltype(&std::free)>;

Memory allocate(std::size_t bytes) {
  Memory memory(static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Working memory of one call. What is not too large is kept by the calling thread, so that a repeated shape allocates
// nothing.
class Scratch {
 public:
  explicit Scratch(std::int64_t floats) : own_(nullptr, &std::free) {
    thread_local Memory kept(nullptr, &std::free);
    thread_local std::size_t kept_bytes = 0;
    const std::size_t bytes = static_cast<std::size_t>(floats) * sizeof(float);
    if (bytes > kKeptBytes) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    if (kept_bytes < bytes) {
      kept.reset();
      kept_bytes = 0;
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }
  [[nodiscard]] float* data() const { return data_; }

 private:
  Memory own_;
  float* data_ = nullptr;
};

std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// How a problem is cut into tiles.
struct Cut {
  std::int64_t heads;          // (batch entry, K/V head) pairs
  std::int64_t rows_per_head;  // of all query heads that share the K/V head
  std::int64_t tile_rows;
  std::int64_t tiles_per_head;

  [[nodiscard]] Tile tile(const AttentionProblem& problem, std::int64_t head, std::int64_t index) const {
    const std::int64_t first_row = index * tile_rows;
    return {.batch = head / problem.kv_heads,
            .kv_head = head % problem.kv_heads,
            .first_row = first_row,
            .rows = static_cast<int>(std::min(tile_rows, rows_per_head - first_row))};
  }
};

// Rows of a tile: as many as leave its arrays and a block of K and V within half a megabyte, so that they stay in the
// second cache, but few enough that every thread gets some tiles. Results do not depend on it.
Cut cut_into_tiles(const AttentionProblem& problem, int threads) {
  constexpr std::int64_t cache_bytes = 512 << 10;
  constexpr std::int64_t tiles_per_thread = 4;
  Cut cut{.heads = problem.batch * problem.kv_heads,
          .rows_per_head = problem.heads / problem.kv_heads * problem.rows,
          .tile_rows = kTileRows,
          .tiles_per_head = 0};
  const auto bytes = [&] { return 8 * (cut.tile_rows + kTileKeys) * problem.head_size; };
  const auto tiles = [&] { return cut.heads * divide_up(cut.rows_per_head, cut.tile_rows); };
  while (cut.tile_rows > 128 && bytes() > cache_bytes) cut.tile_rows /= 2;
  while (cut.tile_rows > 64 && tiles() < tiles_per_thread * threads) cut.tile_rows /= 2;
  cut.tiles_per_head = divide_up(cut.rows_per_head, cut.tile_rows);
  return cut;
}

std::int64_t aligned_floats(std::int64_t floats) { return divide_up(floats, 16) * 16; }

// Tiles that pack the blocks they need themselves: right where no two tiles share any. `problems` have the same numbers
// of rows and heads.
void run_unpacked(std::span<const AttentionProblem> problems, const Executor& executor, const TileKernel& kernel,
                  const Cut& cut) {
  const std::int64_t tiles_per_problem = cut.heads * cut.tiles_per_head;
  const std::int64_t tiles = static_cast<std::int64_t>(problems.size()) * tiles_per_problem;
  const std::int64_t slots = std::min<std::int64_t>(executor.threads, tiles);
  const std::int64_t per_slot = aligned_floats(kernel.scratch_floats(problems[0]));
  const Scratch scratch(slots * per_slot);
  in_order(executor, slots, tiles, [&](std::int64_t slot, std::int64_t i) {
    const AttentionProblem& problem = problems[static_cast<std::size_t>(i / tiles_per_problem)];
    const std::int64_t head = i % tiles_per_problem / cut.tiles_per_head;
    kernel.run(problem, cut.tile(problem, head, i % cut.tiles_per_head), nullptr, scratch.data() + slot * per_slot);
  });
}

// Successive tiles of one head, done by one thread.
struct TileRun {
  std::int64_t head;
  std::int64_t first;
  std::int64_t tiles;
};

// Whole heads at first, less and less towards the end, so that threads end together.
std::vector<TileRun> cut_into_runs(const Cut& cut, int threads) {
  std::vector<TileRun> runs;
  const std::int64_t all = cut.heads * cut.tiles_per_head;
  for (std::int64_t done = 0; done < all;) {
    const std::int64_t first = done % cut.tiles_per_head;
    const std::int64_t share = divide_up(all - done, std::int64_t{2} * threads);
    const std::int64_t tiles = std::min(share, cut.tiles_per_head - first);
    runs.push_back({.head = done / cut.tiles_per_head, .first = first, .tiles = tiles});
    done += tiles;
  }
  return runs;
}

// All blocks of a K/V head.
void pack_head(const AttentionProblem& problem, const TileKernel& kernel, std::int64_t head, float* packed,
               float* scratch) {
  const std::int64_t block_floats = kernel.block_floats(problem);
  for (int segment = 0; segment < problem.num_key_segments; ++segment) {
    for (std::int64_t block = 0; block < blocks_of(problem.key_segments[segment]); ++block, packed += block_floats) {
      kernel.pack(
          problem,
          {.batch = head / problem.kv_heads, .kv_head = head % problem.kv_heads, .segment = segment, .block = block},
          packed, scratch);
    }
  }
}

// Each thread packs K and V of a head once for all tiles of a run. Rejected: packing each head once for all threads, in
// a pipeline beside the tiles of the head before. On two cores (Zen 4) it lost 8 % of 2,16,1024,1024,72 in float32:
// what another core has just written comes slowly.
void run_packed(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel, const Cut& cut,
                std::int64_t head_floats) {
  const std::vector<TileRun> runs = cut_into_runs(cut, executor.threads);
  const auto count = static_cast<std::int64_t>(runs.size());
  const std::int64_t slots = std::min<std::int64_t>(executor.threads, count);
  const std::int64_t tile_floats = aligned_floats(kernel.scratch_floats(problem));
  const Scratch scratch(slots * (tile_floats + head_floats));
  in_order(executor, slots, count, [&](std::int64_t slot, std::int64_t i) {
    const TileRun& run = runs[static_cast<std::size_t>(i)];
    float* tile_scratch = scratch.data() + slot * (tile_floats + head_floats);
    float* packed = tile_scratch + tile_floats;
    if (run.tiles > 1) pack_head(problem, kernel, run.head, packed, tile_scratch);
    for (std::int64_t tile = run.first; tile < run.first + run.tiles; ++tile) {
      kernel.run(problem, cut.tile(problem, run.head, tile), run.tiles > 1 ? packed : nullptr, tile_scratch);
    }
  });
}

// What a thread needs for a packed head; 0 where that would be more memory than it is worth.
std::int64_t packed_head_floats(const AttentionProblem& problem, const TileKernel& kernel, int threads) {
  std::int64_t blocks = 0;
  for (int i = 0; i < problem.num_key_segments; ++i) blocks += blocks_of(problem.key_segments[i]);
  const std::int64_t floats = blocks * kernel.block_floats(problem);
  return floats * 4 * threads <= kPackedBytes ? floats : 0;
}

// --- Few rows, many keys ---

constexpr std::int64_t kMostParts = 34;

// Keys of one part where they are split, a multiple of a block's; 0: not split. With up to half a tile of rows a head
// is one task, which many threads would wait for.
std::int64_t split_keys(const AttentionProblem& problem) {
  constexpr std::int64_t most_rows = 128;
  constexpr std::int64_t part_keys = 1024;
  if (problem.rows > most_rows || problem.keys < 2 * part_keys) return 0;
  return std::max(part_keys, divide_up(divide_up(problem.keys, kMostParts - 2), kTileKeys) * kTileKeys);
}

// Keys [first, first + keys) of a segment.
KeySegment part_of(const AttentionProblem& problem, const KeySegment& whole, std::int64_t first, std::int64_t keys) {
  const auto advance = [](const void* data, ElementType type, std::int64_t elements) -> const void* {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * element_bytes(type);
  };
  KeySegment part = whole;
  part.key = advance(whole.key, problem.type, first * whole.key_strides.token);
  part.value = advance(whole.value, problem.type, first * whole.value_strides.token);
  part.first_key += first;
  part.keys = keys;
  part.length_offset += first;
  part.mask.data = advance(whole.mask.data, whole.mask.type, first * whole.mask.key_stride);
  return part;
}

struct Parts {
  std::vector<AttentionProblem> problems;
  std::int64_t rows = 0;  // of all heads: what one part's out and LSE have

  Parts(const AttentionProblem& whole, std::int64_t keys) : rows(whole.batch * whole.heads * whole.rows) {
    for (int i = 0; i < whole.num_key_segments; ++i) {
      const KeySegment& segment = whole.key_segments[i];
      for (std::int64_t first = 0; first < segment.keys; first += keys) {
        AttentionProblem part = whole;
        part.num_key_segments = 1;
        part.key_segments[0] = part_of(whole, segment, first, std::min(keys, segment.keys - first));
        part.key_segments[1] = {};
        part.out_type = ElementType::float32;
        part.lse_strides = {.batch = whole.heads * whole.rows, .token = 1, .head = whole.rows};
        part.out_strides = {.batch = part.lse_strides.batch * whole.head_size,
                            .token = whole.head_size,
                            .head = whole.rows * whole.head_size};
        problems.push_back(part);
      }
    }
  }
  [[nodiscard]] std::int64_t floats(std::int64_t head_size) const {
    return static_cast<std::int64_t>(problems.size()) * rows * (head_size + 1);
  }
  void place(float* memory, std::int64_t head_size) {
    for (AttentionProblem& part : problems) {
      part.out = memory;
      part.lse = memory + rows * head_size;
      memory += rows * (head_size + 1);
    }
  }
};

struct RowIndex {
  std::int64_t head;
  std::int64_t token;
};

std::int64_t offset(const Strides& strides, std::int64_t batch, RowIndex row) {
  return batch * strides.batch + row.head * strides.head + row.token * strides.token;
}

void store(const AttentionProblem& problem, std::int64_t index, float value) {
  if (problem.type == ElementType::float32) {
    static_cast<float*>(problem.out)[index] = value;
  } else {
    static_cast<std::uint16_t*>(problem.out)[index] =
        problem.type == ElementType::float16 ? to_f16(value) : to_bf16(value);
  }
}

// One row from its parts: each out weighs e^(its LSE − the LSE of all). In the order of the keys.
void merge_row(const AttentionProblem& problem, const Parts& parts, std::int64_t row) {
  const std::int64_t batch = row / (problem.heads * problem.rows);
  const RowIndex index{.head = row / problem.rows % problem.heads, .token = row % problem.rows};
  std::array<float, kMostParts> weights;
  float largest = -kInfinity;
  for (const AttentionProblem& part : parts.problems) {
    if (!(part.lse[row] <= largest)) largest = part.lse[row];  // NaN too
  }
  float total = 0;
  for (std::size_t i = 0; i < parts.problems.size(); ++i) {
    const float lse = parts.problems[i].lse[row];
    weights[i] = lse == -kInfinity ? 0 : std::exp(lse - largest);
    total += weights[i];
  }
  const std::int64_t out = offset(problem.out_strides, batch, index);
  for (std::int64_t d = 0; d < problem.head_size; ++d) {
    float sum = 0;
    for (std::size_t i = 0; i < parts.problems.size(); ++i) {
      if (weights[i] == 0) continue;
      sum += weights[i] / total * static_cast<const float*>(parts.problems[i].out)[row * problem.head_size + d];
    }
    store(problem, out + d, sum);
  }
  if (problem.lse == nullptr) return;
  problem.lse[offset(problem.lse_strides, batch, index)] = total == 0 ? -kInfinity : largest + std::log(total);
}

void run_split(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel,
               std::int64_t part_keys) {
  Parts parts(problem, part_keys);
  const Memory memory = allocate(static_cast<std::size_t>(parts.floats(problem.head_size)) * sizeof(float));
  parts.place(memory.get(), problem.head_size);
  run_unpacked(parts.problems, executor, kernel, cut_into_tiles(parts.problems[0], 1));
  const std::int64_t slots = std::min<std::int64_t>(executor.threads, parts.rows);
  in_order(executor, slots, parts.rows, [&](std::int64_t, std::int64_t row) { merge_row(problem, parts, row); });
}

}  // namespace

void tiled_attention(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel) {
  if (const std::int64_t part_keys = split_keys(problem); part_keys > 0) {
    return run_split(problem, executor, kernel, part_keys);
  }
  const Cut cut = cut_into_tiles(problem, executor.threads);
  const std::int64_t head_floats = packed_head_floats(problem, kernel, executor.threads);
  if (cut.tiles_per_head == 1 || head_floats == 0) return run_unpacked({&problem, 1}, executor, kernel, cut);
  run_packed(problem, executor, kernel, cut, head_floats);
}

}  // namespace ditattn::kernels::cpu
