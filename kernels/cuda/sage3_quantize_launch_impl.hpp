#pragma once

/// The launches that quantize for SAGE_ATTN_3. Approach: sums of stretches of tokens, then means, then numbers: K, V
/// and Q are read twice. Sums are in an order that follows from the lengths alone. Included by the sage3_quantize*.cu
/// alone.

#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/inputs_impl.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sage3_quantize.hpp"
#include "kernels/cuda/sage3_quantize_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr const char* kName = "quantize_sage3";

template <class Format, class T, bool kAligned, int kLanes>
void quantize(const Sage3Arguments& a, void* stream) {
  const AttentionProblem& p = a.problem;
  const std::int64_t sources = p.batch * (2 * p.kv_heads + p.heads);
  const std::int64_t blocks = p.batch * p.kv_heads * a.images.blocks();
  const std::int64_t tiles = p.batch * p.heads * divide_up(p.rows, kSage3Keys);
  if (std::max(sources * a.images.stretches, 2 * blocks + tiles) > kFlashMostTokens) {
    throw std::runtime_error("sage3_attention: more tiles than a launch takes. Split the batch.");
  }
  if (p.ranges != nullptr) queue(find_seen_keys, p.batch, 256, 0, stream, kName, p, a.images.seen);
  constexpr int threads = 16 * kLanes;
  queue(add_up<T, kLanes, kAligned>, sources * a.images.stretches, kAddingThreads, 0, stream, kName, a);
  queue(find_means, sources, 128, 0, stream, kName, a);
  queue(quantize_all<Format, T, kLanes, kAligned>, 2 * blocks + tiles, threads, 0, stream, kName, a);
}

}  // namespace

}  // namespace ditattn::kernels::cuda
