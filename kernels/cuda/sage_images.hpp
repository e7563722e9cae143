#pragma once

/// Q, K and V of 8 bits (V of 16 where that is asked for), as the kernels of quantized attention read them: images of
/// the tiles in shared memory, so that a tile is one copy. Which numbers they are is sage_quantize.hpp's matter.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention_problem.hpp"

namespace ditattn::kernels::cuda {

/// How tiles are cut for a kernel.
struct SageShape {
  int head;                  ///< channels of the output that the kernel computes: rows of V's image
  int channels;              ///< of Q's and K's rows, zeros past the tensors': 64, 128 or 256
  int keys;                  ///< of a block
  bool wide_values = false;  ///< V in float16, else in e4m3
};

/// A channel over keys that are seen; of K the sum alone.
struct SageTotal {
  float sum;
  float high;
  float low;
};

/// Channels of Q's and K's rows for a kernel of so many.
__host__ __device__ constexpr int sage_channels(int head) { return head <= 64 ? 64 : head <= 128 ? 128 : 256; }

constexpr int kSageQueryRows = 64;     // of a tile of Q
constexpr int kSageKeyGroups = 4;      // scales of a block of keys: key k has that of (k mod 8) / 2
constexpr int kSageMostStretches = 8;  // of a head's keys, whose sums are added up in order

/// A channel's mean is taken off V where it is at least 1 / so much of the channel's largest number. Elements of 16
/// bits that were moved by less than their steps would be rounded as before, and the output be off by the mean.
constexpr float kSageLeastMean = 64;

/// The images of a problem in device memory. Tiles of 64 rows of Q and blocks of K and V, batch · heads of them, heads
/// the faster; in each those of the first segment, then those of the second.
struct SageImages {
  SageShape shape{};
  int query_tiles[2] = {};  ///< of a segment
  int key_blocks[2] = {};

  std::int8_t* query = nullptr;       ///< 64 rows: tiles of (64, channels)
  float* query_scale = nullptr;       ///< [64] of a tile: softmax scale · log₂e in it
  std::int8_t* key = nullptr;         ///< blocks of (keys, channels)
  float* key_scale = nullptr;         ///< [4] of a block
  std::uint32_t* key_bits = nullptr;  ///< [keys / 32] of a block: which keys a mask does not hide, where there is one
  std::uint8_t* value = nullptr;      ///< e4m3: blocks of (head, keys), keys in the order of `sage_key_at`; float16:
                                      ///< blocks of (keys, head)
  float* value_scale = nullptr;       ///< [channels] of a head
  float* value_mean = nullptr;        ///< [channels] of a head: zeros where V is not smoothed
  float* key_mean = nullptr;          ///< [channels] of a head: zeros where K is not smoothed
  std::int64_t* seen = nullptr;       ///< [batch, 2]: what some row sees, lengths aside, where ranges say it
  SageTotal* totals = nullptr;        ///< [stretches, channels] of a head's K, then of V, where one launch makes them
  int* total_keys = nullptr;          ///< for the next: those [stretches] that were added up
  std::int64_t bytes = 0;             ///< of all
};

/// The key of 32 that stands at position `at`: so the probabilities that a thread has after the first product are those
/// it needs for the second (m64nNk32's sums and first operand differ in it).
__host__ __device__ constexpr int sage_key_at(int at) {
  return 8 * (at / 16 * 2 + at % 4 / 2) + 2 * (at % 16 / 4) + at % 2;
}

/// Rows lie in panels of 32, 64 or 128 bytes, of which pieces of 16 bytes are swapped by the row, as shared memory's
/// banks want it (PTX ISA, "Swizzling modes").
constexpr int kSagePanelKeys = 32;       // of V in e4m3
constexpr int kSageWidePanelBytes = 64;  // in float16: of a row, a key's channels
__host__ __device__ constexpr int sage_row_bytes(int channels) { return channels < 128 ? channels : 128; }
__host__ __device__ constexpr int sage_place(int rows, int row_bytes, int row, int byte) {
  const int in_panel = byte % row_bytes;
  const int swap = row / (128 / row_bytes) % (row_bytes / 16);
  return byte / row_bytes * rows * row_bytes + row * row_bytes + (in_panel / 16 ^ swap) * 16 + in_panel % 16;
}

/// For a kernel of this shape; `memory` is of the device, at a multiple of 256 bytes, or null: then only `bytes`
/// counts.
SageImages place_sage_images(const AttentionProblem& problem, const SageShape& shape, char* memory);

}  // namespace ditattn::kernels::cuda
