#include <utility>

#include "backends/flashinfer_attn/fa2_plan.hpp"
#include "backends/flashinfer_attn/prefill.hpp"
#include "backends/flashinfer_attn/sequence_tiles.cuh"
#include "kernels/cuda/launch_impl.hpp"

namespace ditattn::flashinfer_attn {
namespace {

using kernels::cuda::Sequences;

constexpr int kThreads = 256;
constexpr std::int64_t kSmallestTile = 16;  // of FlashInfer's choices

// Batch entries of one size.
struct Entries {
  int count, rows, keys, tiles;
};

__global__ void plan_kernel(Fa2Plan plan, Entries of, Sequences sequences, int group, int tile) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const bool packed = sequences.numbers != nullptr;
  if (i == 0) *plan.chunk_size = of.keys > 0 ? of.keys : 1;
  if (packed && i < sequences.count) {
    plan.first_rows[i] = static_cast<std::int32_t>(sequences.numbers[4 * i] - sequences.rows_before);
    plan.first_keys[i] = static_cast<std::int32_t>(sequences.numbers[4 * i + 2] - sequences.keys_before);
  }
  if (!packed && i < of.count) {
    plan.first_rows[i] = i * of.rows;
    plan.first_keys[i] = i * of.keys;
  }
  if (i >= plan.blocks) return;
  const SequenceTile work =
      packed ? sequence_tile(sequences, group, tile, i) : SequenceTile{i / of.tiles, i % of.tiles, true};
  plan.entries[i] = work.sequence;
  plan.tiles[i] = work.tile;
  plan.zeros[i] = 0;
  plan.valid[i] = work.valid;
}

std::int64_t tiles_of(const kernels::AttentionProblem& p, std::int64_t tile) {
  return (p.rows * (p.heads / p.kv_heads) + tile - 1) / tile;
}

std::int64_t entries_of(const kernels::AttentionProblem& p, const Sequences& sequences) {
  return sequences.numbers == nullptr ? p.batch : sequences.count;
}

std::int64_t blocks_of(const kernels::AttentionProblem& p, const Sequences& sequences, std::int64_t tile) {
  if (sequences.numbers == nullptr) return p.batch * tiles_of(p, tile);
  return sequence_blocks(sequences, p.batch * p.rows, p.heads / p.kv_heads, tile);
}

}  // namespace

void run_prefill(const BuiltPrefill& prefill, const kernels::AttentionProblem& p, const PrefillMemory& memory,
                 const kernels::cuda::Launch& launch) {
  const kernels::cuda::OnDevice on_device(launch.device);
  prefill.run(p, memory, launch);
}

std::int64_t plan_entries(const kernels::AttentionProblem& p, const Sequences& sequences) {
  const std::int64_t blocks = blocks_of(p, sequences, kSmallestTile);
  return 1 + 2 * entries_of(p, sequences) + 3 * blocks + (blocks + 3) / 4;
}

Fa2Plan write_fa2_plan(const kernels::AttentionProblem& p, const Sequences& sequences, std::int64_t tile,
                       std::int32_t* memory, const kernels::cuda::Launch& launch) {
  const std::int64_t entries = entries_of(p, sequences);
  const std::int64_t blocks = blocks_of(p, sequences, tile);
  Fa2Plan plan{};
  plan.chunk_size = memory;
  plan.blocks = blocks;
  std::int32_t* next = memory + 1;
  const auto take = [&](std::int64_t count) { return std::exchange(next, next + count); };
  plan.first_rows = take(entries);
  plan.first_keys = take(entries);
  plan.entries = take(blocks);
  plan.tiles = take(blocks);
  plan.zeros = take(blocks);
  plan.valid = reinterpret_cast<bool*>(next);
  const auto whole = [](std::int64_t number) { return static_cast<int>(number); };
  plan_kernel<<<static_cast<unsigned>((blocks + kThreads - 1) / kThreads), kThreads, 0,
                static_cast<cudaStream_t>(launch.stream)>>>(
      plan, {whole(p.batch), whole(p.rows), whole(p.keys), whole(tiles_of(p, tile))}, sequences,
      whole(p.heads / p.kv_heads), whole(tile));
  kernels::cuda::check(cudaGetLastError(), "FLASHINFER_ATTN's plan");
  return plan;
}

}  // namespace ditattn::flashinfer_attn
