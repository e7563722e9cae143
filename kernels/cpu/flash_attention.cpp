#include "kernels/cpu/flash_attention.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels/cpu/flash_tile.hpp"
#include "kernels/cpu/level_kernels.hpp"

namespace ditattn::kernels::cpu {
namespace {

const FlashKernel& kernel_for(const AttentionProblem& problem, CpuUnits units) {
  // The largest product is the largest logit only where the scale is positive.
  const bool dot = units.bf16_dot && problem.type == ElementType::bfloat16 && problem.scale > 0;
  const LevelKernels& kernels = kernels_of(units.level);
  return dot ? *kernels.flash_bf16_dot : *kernels.flash_f32;
}

// Grows and is kept by the calling thread, so that a repeated shape allocates nothing.
float* thread_scratch(std::size_t floats) {
  thread_local std::unique_ptr<float, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local std::size_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

// Slots take tiles from one counter until none is left; each has its own scratch.
struct Run {
  const AttentionProblem& problem;
  const FlashKernel& kernel;
  std::int64_t rows_per_head;
  std::int64_t tile_rows;
  std::int64_t tiles_per_head;
  std::int64_t tiles;
  float* scratch;
  std::int64_t scratch_per_slot;
  std::atomic<std::int64_t> next{0};

  void work(std::int64_t slot) {
    for (std::int64_t i = next++; i < tiles; i = next++) {
      const std::int64_t head = i / tiles_per_head;
      const std::int64_t first_row = i % tiles_per_head * tile_rows;
      kernel.run(problem,
                 {.batch = head / problem.kv_heads,
                  .kv_head = head % problem.kv_heads,
                  .first_row = first_row,
                  .rows = static_cast<int>(std::min<std::int64_t>(tile_rows, rows_per_head - first_row))},
                 scratch + slot * scratch_per_slot);
    }
  }
};

// Rows of a tile: as many as leave its arrays and a block of K and V within half a megabyte, so that they stay in the
// second cache, but few enough that every thread gets some tiles. Results do not depend on it.
std::int64_t choose_tile_rows(const AttentionProblem& problem, std::int64_t rows_per_head, int threads) {
  constexpr std::int64_t cache_bytes = 512 << 10;
  constexpr std::int64_t tiles_per_thread = 4;
  std::int64_t rows = kTileRows;
  const auto bytes = [&] { return 8 * (rows + kTileKeys) * problem.head_size; };
  const auto tiles = [&] { return problem.batch * problem.kv_heads * ((rows_per_head + rows - 1) / rows); };
  while (rows > 128 && bytes() > cache_bytes) rows /= 2;
  while (rows > 64 && tiles() < tiles_per_thread * threads) rows /= 2;
  return rows;
}

}  // namespace

CpuUnits choose_units(CpuLevel level, bool always) {
  const auto [f32, bf16_dot] = kernels_of(level);
  if (bf16_dot == nullptr) return {.level = level};
  const bool faster = always || bf16_dot->multiply_rate() > 1.2 * f32->multiply_rate();
  return {.level = level, .bf16_dot = faster};
}

void flash_attention(const AttentionProblem& problem, const Executor& executor, CpuUnits units) {
  const FlashKernel& kernel = kernel_for(problem, units);
  const std::int64_t rows_per_head = problem.heads / problem.kv_heads * problem.rows;
  const std::int64_t tile_rows = choose_tile_rows(problem, rows_per_head, executor.threads);
  const std::int64_t tiles_per_head = (rows_per_head + tile_rows - 1) / tile_rows;
  const std::int64_t tiles = problem.batch * problem.kv_heads * tiles_per_head;
  const std::int64_t slots = std::min<std::int64_t>(executor.threads, tiles);
  const bool has_mask = problem.key_segments[0].mask.data != nullptr || problem.key_segments[1].mask.data != nullptr;
  const std::int64_t per_slot = (kernel.scratch_floats(problem.head_size, has_mask) + 15) / 16 * 16;
  Run run{.problem = problem,
          .kernel = kernel,
          .rows_per_head = rows_per_head,
          .tile_rows = tile_rows,
          .tiles_per_head = tiles_per_head,
          .tiles = tiles,
          .scratch = thread_scratch(static_cast<std::size_t>(slots * per_slot)),
          .scratch_per_slot = per_slot};
  executor.parallel_for(
      slots, [](void* context, std::int64_t slot) { static_cast<Run*>(context)->work(slot); }, &run);
}

}  // namespace ditattn::kernels::cpu
