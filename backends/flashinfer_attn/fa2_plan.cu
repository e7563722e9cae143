#include <utility>

#include "backends/flashinfer_attn/fa2_plan.hpp"
#include "backends/flashinfer_attn/prefill.hpp"
#include "kernels/cuda/launch_impl.hpp"

namespace ditattn::flashinfer_attn {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kSmallestTile = 16;  // of FlashInfer's choices

__global__ void plan_kernel(Fa2Plan plan, int batch, int rows, int keys, int tiles) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i == 0) *plan.chunk_size = keys > 0 ? keys : 1;
  if (i < batch) {
    plan.first_rows[i] = i * rows;
    plan.first_keys[i] = i * keys;
  }
  if (i < batch * tiles) {
    plan.entries[i] = i / tiles;
    plan.tiles[i] = i % tiles;
    plan.zeros[i] = 0;
  }
}

std::int64_t tiles_of(const kernels::AttentionProblem& p, std::int64_t tile) {
  return (p.rows * (p.heads / p.kv_heads) + tile - 1) / tile;
}

}  // namespace

void run_prefill(const BuiltPrefill& prefill, const kernels::AttentionProblem& p, const PrefillMemory& memory,
                 const kernels::cuda::Launch& launch) {
  const kernels::cuda::OnDevice on_device(launch.device);
  prefill.run(p, memory, launch);
}

std::int64_t plan_entries(const kernels::AttentionProblem& p) {
  return 1 + 2 * p.batch + 3 * p.batch * tiles_of(p, kSmallestTile);
}

Fa2Plan write_fa2_plan(const kernels::AttentionProblem& p, std::int64_t tile, std::int32_t* memory,
                       const kernels::cuda::Launch& launch) {
  const std::int64_t tiles = tiles_of(p, tile);
  const std::int64_t blocks = p.batch * tiles;
  Fa2Plan plan{};
  plan.chunk_size = memory;
  plan.blocks = blocks;
  std::int32_t* next = memory + 1;
  const auto take = [&](std::int64_t count) { return std::exchange(next, next + count); };
  plan.first_rows = take(p.batch);
  plan.first_keys = take(p.batch);
  plan.entries = take(blocks);
  plan.tiles = take(blocks);
  plan.zeros = take(blocks);
  plan_kernel<<<static_cast<unsigned>((blocks + kThreads - 1) / kThreads), kThreads, 0,
                static_cast<cudaStream_t>(launch.stream)>>>(plan, static_cast<int>(p.batch), static_cast<int>(p.rows),
                                                            static_cast<int>(p.keys), static_cast<int>(tiles));
  kernels::cuda::check(cudaGetLastError(), "FLASHINFER_ATTN's plan");
  return plan;
}

}  // namespace ditattn::flashinfer_attn
