#pragma once

/// Copying rows of tokens, for kernels that do.

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/token_rows.hpp"

namespace ditattn::kernels::cuda {

inline constexpr unsigned kRowThreads = 128;
inline constexpr unsigned kPiecesAtOnce = 4;  // of a thread: as much is under way as memory, another GPU's too, takes

struct RowCopies {
  RowCopy of[kRowCopiesAtOnce];
  unsigned count = 0;
};

__device__ inline std::int64_t offset(const Strides& of, unsigned batch, unsigned token, unsigned head) {
  return batch * of.batch + token * of.token + head * of.head;
}

/// Block `index` of a copy. `Piece` is what a thread moves at once; the pieces of a copy are numbered as they would lie
/// together.
template <class Piece>
__device__ void move_rows(const RowCopy& copy, unsigned index) {
  const auto tokens = static_cast<unsigned>(copy.shape.tokens);
  const auto heads = static_cast<unsigned>(copy.shape.heads);
  const auto pieces = static_cast<unsigned>(copy.shape.head_size * copy.element_bytes / sizeof(Piece));
  const unsigned per_token = heads * pieces;
  const std::uint64_t total = std::uint64_t{static_cast<unsigned>(copy.shape.batch)} * tokens * per_token;
  const std::uint64_t first = std::uint64_t{index} * kRowThreads * kPiecesAtOnce;
  if (first >= total) return;
  const auto row = static_cast<unsigned>(first / per_token);
  const auto begin = static_cast<unsigned>(first % per_token);  // of this block in its first token
  const auto left = static_cast<unsigned>(min(total - first, std::uint64_t{kRowThreads * kPiecesAtOnce}));
  Piece moved[kPiecesAtOnce];
  Piece* to[kPiecesAtOnce];
#pragma unroll
  for (unsigned i = 0; i < kPiecesAtOnce; ++i) {
    const unsigned at = threadIdx.x + i * kRowThreads;
    if (at >= left) break;
    const unsigned batch_and_token = row + (begin + at) / per_token;
    const unsigned in_token = (begin + at) % per_token;
    const unsigned batch = copy.shape.batch == 1 ? 0 : batch_and_token / tokens;
    const unsigned token = batch_and_token - batch * tokens;
    const unsigned head = heads == 1 ? 0 : in_token / pieces;
    const unsigned piece = in_token - head * pieces;
    const auto place = [&](const Strides& strides) { return offset(strides, batch, token, head) * copy.element_bytes; };
    moved[i] = reinterpret_cast<const Piece*>(static_cast<const char*>(copy.from) + place(copy.from_strides))[piece];
    to[i] = reinterpret_cast<Piece*>(static_cast<char*>(copy.to) + place(copy.to_strides)) + piece;
  }
#pragma unroll
  for (unsigned i = 0; i < kPiecesAtOnce; ++i) {
    if (threadIdx.x + i * kRowThreads < left) *to[i] = moved[i];
  }
}

/// Whether all rows begin at multiples of so many bytes.
inline bool lie_in(std::int64_t bytes, const void* data, const Strides& strides, std::int64_t element_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0 &&
         strides.batch * element_bytes % bytes == 0 && strides.token * element_bytes % bytes == 0 &&
         strides.head * element_bytes % bytes == 0;
}

/// Heads that lie together on both sides are one.
inline RowCopy joined(RowCopy copy) {
  TokenShape& shape = copy.shape;
  if (copy.to_strides.head != shape.head_size || copy.from_strides.head != shape.head_size) return copy;
  shape.head_size *= shape.heads;
  shape.heads = 1;
  return copy;
}

/// Blocks that `move_rows` needs for the longest of them, in pieces of so many bytes.
inline std::int64_t blocks_of(std::span<const RowCopy> copies, std::int64_t piece) {
  std::int64_t blocks = 0;
  for (const RowCopy& copy : copies) {
    const auto& [batch, tokens, heads, head_size] = copy.shape;
    const std::int64_t per_token = heads * head_size * copy.element_bytes / piece;
    constexpr std::int64_t per_block = kRowThreads * kPiecesAtOnce;
    blocks = std::max(blocks, (batch * tokens * per_token + per_block - 1) / per_block);
    if (blocks > 2147483647 || per_token > 2147483647 || batch * tokens > 2147483647) {
      throw std::runtime_error("Tensors of " + std::to_string(batch) + " times " + std::to_string(tokens) +
                               " tokens are too large for one launch. Split the batch.");
    }
  }
  return blocks;
}

/// Calls body(piece, copies) for as many copies at once as a launch takes, in the largest pieces in which all of them
/// lie.
template <class Body>
void for_each_launch(std::span<const RowCopy> copies, const Body& body) {
  for (std::size_t first = 0; first < copies.size(); first += kRowCopiesAtOnce) {
    const auto some = copies.subspan(first, std::min(kRowCopiesAtOnce, copies.size() - first));
    const auto all_in = [&](std::int64_t bytes) {
      return std::ranges::all_of(some, [&](const RowCopy& copy) {
        return copy.shape.head_size * copy.element_bytes % bytes == 0 &&
               lie_in(bytes, copy.to, copy.to_strides, copy.element_bytes) &&
               lie_in(bytes, copy.from, copy.from_strides, copy.element_bytes);
      });
    };
    RowCopies together{.of = {}, .count = static_cast<unsigned>(some.size())};
    std::ranges::transform(some, together.of, joined);
    all_in(16)  ? body(uint4{}, together)
    : all_in(4) ? body(std::uint32_t{}, together)
                : body(std::uint16_t{}, together);
  }
}

}  // namespace ditattn::kernels::cuda
