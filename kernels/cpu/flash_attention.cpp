#include "kernels/cpu/flash_attention.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels/cpu/flash_tile.hpp"

namespace ditattn::kernels::cpu {
namespace {

const FlashKernel& kernel_for(CpuLevel level) {
  switch (level) {
    case CpuLevel::avx512:
      return kFlashAvx512;
    case CpuLevel::avx2:
      return kFlashAvx2;
    case CpuLevel::sse2:
      break;
  }
  return kFlashSse2;
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
  std::int64_t tiles_per_head;
  std::int64_t tiles;
  float* scratch;
  std::int64_t scratch_per_slot;
  std::atomic<std::int64_t> next{0};

  void work(std::int64_t slot) {
    for (std::int64_t i = next++; i < tiles; i = next++) {
      const std::int64_t head = i / tiles_per_head;
      const std::int64_t first_row = i % tiles_per_head * kTileRows;
      kernel.run(problem,
                 {.batch = head / problem.kv_heads,
                  .kv_head = head % problem.kv_heads,
                  .first_row = first_row,
                  .rows = static_cast<int>(std::min<std::int64_t>(kTileRows, rows_per_head - first_row))},
                 scratch + slot * scratch_per_slot);
    }
  }
};

}  // namespace

void flash_attention(const AttentionProblem& problem, const Executor& executor, CpuLevel level) {
  const FlashKernel& kernel = kernel_for(level);
  const std::int64_t rows_per_head = problem.heads / problem.kv_heads * problem.rows;
  const std::int64_t tiles_per_head = (rows_per_head + kTileRows - 1) / kTileRows;
  const std::int64_t tiles = problem.batch * problem.kv_heads * tiles_per_head;
  const std::int64_t slots = std::min<std::int64_t>(executor.threads, tiles);
  const bool has_mask = problem.key_segments[0].mask.data != nullptr || problem.key_segments[1].mask.data != nullptr;
  const std::int64_t per_slot = (kernel.scratch_floats(problem.head_size, has_mask) + 15) / 16 * 16;
  Run run{.problem = problem,
          .kernel = kernel,
          .rows_per_head = rows_per_head,
          .tiles_per_head = tiles_per_head,
          .tiles = tiles,
          .scratch = thread_scratch(static_cast<std::size_t>(slots * per_slot)),
          .scratch_per_slot = per_slot};
  executor.parallel_for(
      slots, [](void* context, std::int64_t slot) { static_cast<Run*>(context)->work(slot); }, &run);
}

}  // namespace ditattn::kernels::cpu
