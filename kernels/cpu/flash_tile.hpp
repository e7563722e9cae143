#pragma once

/// The interface between flash_attention.cpp, which splits a problem into tiles, and the units per instruction set,
/// which compute one.

#include <cstdint>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu {

/// Rows of one tile: query rows that share a K/V head (for GQA, rows of several query heads).
inline constexpr int kTileRows = 128;

/// Keys read at a time: 128 × 128 logits and a K and a V block of head size 128 take 192 KiB, which fits every L2.
inline constexpr int kTileKeys = 128;

/// Rows [first_row, first_row + rows) of (batch entry, K/V head). Row r is row r mod `rows` of the K/V head's query
/// head r / `rows`.
struct FlashTile {
  std::int64_t batch;
  std::int64_t kv_head;
  std::int64_t first_row;
  int rows;
};

/// One level's kernel. `scratch` has `scratch_floats(head_size, has_mask)` floats, 64-byte aligned.
struct FlashKernel {
  std::int64_t (*scratch_floats)(std::int64_t head_size, bool has_mask);
  void (*run)(const AttentionProblem& problem, const FlashTile& tile, float* scratch);
};

extern const FlashKernel kFlashSse2;
extern const FlashKernel kFlashAvx2;
extern const FlashKernel kFlashAvx512;

}  // namespace ditattn::kernels::cpu
