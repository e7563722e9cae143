#pragma once

/// Tokens of all heads against all tokens of some heads, and back.

#include <memory>
#include <span>

#include "parallel/group.hpp"

namespace ditattn::parallel {

/// A tensor on its way.
struct Arriving {
  Tensor tensor;  ///< token-major; to be read after `wait`
  std::unique_ptr<Pending> pending;

  void wait() const {
    if (pending) pending->wait();
  }
};

/// Starts to give each rank of `ulysses` its heads of this rank's tokens, `mine` (B, tokens[rank], all heads, D), and
/// to collect this rank's heads of everybody's tokens in `memory`. `sent`: where what is sent is put together.
Arriving scatter_heads(Communicator& ulysses, Workspace& workspace, Slot sent, void* memory, const Tensor& mine,
                       std::span<const Range> heads, std::span<const std::int64_t> tokens);

/// The way back: `rows` (token-major, everybody's rows, this rank's heads) becomes `to` (B, this rank's rows, all
/// heads, D).
void gather_heads(Communicator& ulysses, Workspace& workspace, const Tensor& rows, const Tensor& to,
                  std::span<const Range> heads, std::span<const std::int64_t> tokens);

/// `to` (B, rows, all heads, D) on every rank, of which rank r has rows[r] and heads[r] in `mine` (token-major).
void gather_parts(Communicator& all, Workspace& workspace, const Tensor& mine, const Tensor& to,
                  std::span<const Range> rows, std::span<const Range> heads);

/// Bytes of a tensor of so many tokens and heads, else like this one.
std::int64_t bytes_of(const Tensor& like, std::int64_t tokens, std::int64_t heads);

}  // namespace ditattn::parallel
