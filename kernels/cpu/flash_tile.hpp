#pragma once

/// The interface between flash_attention.cpp, which splits a problem into tiles, and the units per instruction set,
/// which compute one.

#include <cstdint>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu {

/// Most rows of one tile: query rows that share a K/V head (for GQA, rows of several query heads). Each block of K and
/// V is loaded once a tile.
inline constexpr int kTileRows = 256;

/// Keys read at a time.
inline constexpr int kTileKeys = 128;

/// Rows [first_row, first_row + rows) of (batch entry, K/V head). Row r is row r mod `rows` of the K/V head's query
/// head r / `rows`.
struct FlashTile {
  std::int64_t batch;
  std::int64_t kv_head;
  std::int64_t first_row;
  int rows;
};

/// One unit's kernel. `scratch` has `scratch_floats(head_size, has_mask)` floats, 64-byte aligned.
struct FlashKernel {
  std::int64_t (*scratch_floats)(std::int64_t head_size, bool has_mask);
  void (*run)(const AttentionProblem& problem, const FlashTile& tile, float* scratch);
  double (*multiply_rate)();  ///< of its micro-kernel, to compare units of this CPU
};

extern const FlashKernel kFlashSse2;
extern const FlashKernel kFlashAvx2;
extern const FlashKernel kFlashAvx512;
extern const FlashKernel kFlashAvx512Bf16;  ///< bfloat16 elements, positive scale
extern const FlashKernel kFlashNeon;

}  // namespace ditattn::kernels::cpu
