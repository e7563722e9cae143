#pragma once

/// The interface between tiled_attention.cpp, which splits a problem into tiles, and the units per instruction set,
/// which compute one.

#include <cstdint>

#include "kernels/cpu/attention_problem.hpp"
#include "kernels/sage3.hpp"

namespace ditattn::kernels::cpu {

/// Most rows of one tile: query rows that share a K/V head (for GQA, rows of several query heads). Each block of K and
/// V is read once a tile.
inline constexpr int kTileRows = 256;

/// Keys of a block. Blocks start at multiples of this in their segment, whatever the rows.
inline constexpr int kTileKeys = 128;

/// Rows [first_row, first_row + rows) of (batch entry, K/V head). Row r is row r mod `rows` of the K/V head's query
/// head r / `rows`.
struct Tile {
  std::int64_t batch;
  std::int64_t kv_head;
  std::int64_t first_row;
  int rows;
};

/// Keys [block · kTileKeys, …) of a segment, for a batch entry and K/V head.
struct KeyBlock {
  std::int64_t batch;
  std::int64_t kv_head;
  int segment;
  std::int64_t block;
};

namespace {

/// Blocks of a segment; of a packed K/V head, its first segment's come first. Local to each unit, as all they share.
[[maybe_unused]] constexpr std::int64_t blocks_of(const KeySegment& segment) {
  return (segment.keys + kTileKeys - 1) / kTileKeys;
}

}  // namespace

/// One unit's kernel. All memory is 64-byte aligned.
struct TileKernel {
  /// What `run` needs as scratch.
  std::int64_t (*scratch_floats)(const AttentionProblem& problem);
  /// What one block of K and V needs in the kernel's own layout.
  std::int64_t (*block_floats)(const AttentionProblem& problem);
  void (*pack)(const AttentionProblem& problem, const KeyBlock& block, float* packed, float* scratch);
  /// `packed`: all blocks of the tile's K/V head, segment by segment; null: `run` packs the blocks it needs itself.
  void (*run)(const AttentionProblem& problem, const Tile& tile, const float* packed, float* scratch);
  double (*multiply_rate)();  ///< of its micro-kernel, to compare units of this CPU
  /// Of one of batch · kv_heads heads, where the kernel wants `problem.means`; null: it does not.
  void (*find_means)(const AttentionProblem& problem, std::int64_t head, Sage3Smoothing smoothing,
                     float* means) = nullptr;
};

extern const TileKernel kFlashNeon;
extern const TileKernel kFlashSse2;
extern const TileKernel kFlashAvx2;
extern const TileKernel kFlashAvx512;
/// bfloat16 elements, positive scale.
extern const TileKernel kFlashAvx512Bf16, kFlashAmx;

/// Quantized attention, and with V in 16 bits and more.
extern const TileKernel kSageNeon, kSageWideNeon;
extern const TileKernel kSageSse2, kSageWideSse2;
extern const TileKernel kSageAvx2, kSageWideAvx2;
extern const TileKernel kSageAvx512, kSageWideAvx512;
extern const TileKernel kSageAvx512Vnni, kSageWideAvx512Vnni;
extern const TileKernel kSageAmx;

/// Microscaled FP4, emulated.
extern const TileKernel kSage3Neon, kSage3Sse2, kSage3Avx2, kSage3Avx512, kSage3Avx512Bf16, kSage3Amx;

}  // namespace ditattn::kernels::cpu
