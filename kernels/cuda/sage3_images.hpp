#pragma once

/// What the kernels of SAGE_ATTN_3 read: Q, K and V of NVFP4, emulated, and what goes with them, in device memory.
/// docs/kernels/sage3.md defines the numbers.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention_problem.hpp"
#include "kernels/sage3.hpp"

namespace ditattn::kernels::cuda {

/// Floats that go with a block of keys for each query head: q̄ · (k − k̄) · scale · log₂e of each key, in the order of
/// `sage3_correction_at` (packed: as they are), then K's scale and V's (1 where V's numbers are all zeros).
constexpr int kSage3Record = kSage3Keys + 4;
constexpr int kSage3KeyScale = kSage3Keys;
constexpr int kSage3ValueScale = kSage3Keys + 1;

constexpr int kSage3MostStretches = 64;  // of a head's tokens, whose sums are added up in order

/// The key of a block that is column `column` of the product with it: so a thread, which has columns 8 · j + 2 · (lane
/// % 4) + c, has 32 successive keys of a row, two groups of NVFP4.
__host__ __device__ constexpr int sage3_key_at(int column) {
  return 32 * (column % 8 / 2) + 16 * (column / 64) + 2 * (column % 64 / 8) + column % 2;
}
/// The inverse.
__host__ __device__ constexpr int sage3_column_of(int key) {
  return 64 * (key % 32 / 16) + 8 * (key % 16 / 2) + 2 * (key / 32) + key % 2;
}
/// Where a key's correction is in the record: threads read four keys at once, without meeting in a bank.
__host__ __device__ constexpr int sage3_correction_at(int key) { return key % 32 / 4 * 16 + key / 32 * 4 + key % 4; }

/// A channel over some tokens.
struct Sage3Total {
  float sum;
  float largest;
};

/// The images of a problem, emulated or packed. `channels` is the head size, rounded up to whole groups, or steps of
/// products.
struct Sage3Images {
  bool packed = false;
  int channels = 0;
  int key_blocks[2] = {};  ///< of a segment
  int stretches = 0;

  // Numbers times their groups' scales, in the problem's dtype; packed: e2m1, two to a byte, and apart scales in e4m3,
  // one for 16 numbers.
  void* query = nullptr;         ///< (batch, heads, rows, channels)
  float* query_scale = nullptr;  ///< (batch, heads, rows): the rows' scales times scale · log₂e
  void* key = nullptr;           ///< (batch, kv_heads, blocks · 128, channels), keys in the order of `sage3_key_at`
                                 ///< (packed: fp4::key_at)
  void* value = nullptr;         ///< as K; packed: (batch, kv_heads, blocks, channels, 128), keys as they are
  std::uint8_t* query_groups = nullptr;
  std::uint8_t* key_groups = nullptr;
  std::uint8_t* value_groups = nullptr;
  float* records = nullptr;           ///< (batch, heads, blocks, kSage3Record)
  std::uint32_t* key_bits = nullptr;  ///< (batch, blocks, 4): keys that a mask does not hide, where there is one
  float* means = nullptr;             ///< (batch · kv_heads of K, as many of V, batch · heads of Q; channels)
  Sage3Total* totals = nullptr;       ///< of the same, with stretches before channels
  int* total_tokens = nullptr;        ///< [stretches] of the same: those that were added up
  std::int64_t* seen = nullptr;       ///< [batch, 2]: what some row sees, lengths aside, where ranges say it
  std::int64_t bytes = 0;             ///< of all

  __host__ __device__ int blocks() const { return key_blocks[0] + key_blocks[1]; }
};

/// `memory` is of the device, at a multiple of 256 bytes, or null: then only `bytes` counts.
Sage3Images place_sage3_images(const AttentionProblem& problem, char* memory, bool packed = false);

/// The problem of emulated images' Q, K and V: what kernels copy blocks of. Keys are those of whole blocks.
AttentionProblem problem_of(const AttentionProblem& problem, const Sage3Images& images);

}  // namespace ditattn::kernels::cuda
