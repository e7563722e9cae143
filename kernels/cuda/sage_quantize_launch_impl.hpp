#pragma once

/// What the launchers of the kernels that quantize have in common. Included by the sage_quantize_*.cu alone.

#include <algorithm>
#include <bit>
#include <utility>

#include "kernels/cuda/inputs_impl.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sage_quantize_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

// 16 tokens a warp.
template <int kLanes>
constexpr int kTokenBytes = kBlockThreads<kLanes> / 2 * kLanes * 16;

// Without `ranks`.
Arguments quantizing_arguments(const AttentionProblem& problem, const SageQuantization& quantization,
                               const SageImages& images) {
  const int blocks = images.key_blocks[0] + images.key_blocks[1];
  return {.problem = problem,
          .quantization = quantization,
          .images = images,
          .heads = blocks == 0 ? 0 : static_cast<unsigned>(problem.kv_heads * problem.batch),
          .stretches = std::bit_floor(static_cast<unsigned>(std::clamp(blocks, 1, kSageMostStretches)))};
}

// Blocks of threads for K, V and Q. Throws std::runtime_error where they are too many.
std::int64_t quantizing_blocks(const Arguments& a, int threads) {
  const AttentionProblem& p = a.problem;
  const std::int64_t tiles = (a.images.query_tiles[0] + a.images.query_tiles[1]) * p.heads * p.batch;
  const std::int64_t of_queries = divide_up(tiles, threads / kThreads * std::int64_t{a.ranks});
  const std::int64_t blocks = (2 * std::int64_t{a.heads} + of_queries) * a.ranks;
  if (blocks <= kFlashMostTokens) return blocks;
  throw std::runtime_error("sage_attention: more tiles than a launch takes. Split the batch.");
}

bool offsets_lse(const Arguments& a) { return a.problem.lse != nullptr && a.quantization.smooth_key && a.heads != 0; }
std::int64_t offset_blocks(const AttentionProblem& p) { return divide_up(p.batch * p.heads * p.rows, kThreads / 32); }

[[noreturn]] void refuse_shape() {
  throw std::logic_error("quantize_sage: a kernel's blocks are of another size than any here.");
}

}  // namespace
}  // namespace ditattn::kernels::cuda
