#pragma once

/// What a rank sends from a GPU's memory: bytes that lie together, or tokens that need not.

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "ditattn/communicator.hpp"
#include "kernels/cuda/token_rows.hpp"

namespace ditattn::parallel {

struct Outgoing {
  int rank = 0;             ///< that gets it
  std::int64_t bytes = 0;   ///< as it is sent
  bool is_together = true;  ///< `rows.from` are its bytes
  /// Tokens, and in `to` memory where they may be put together; of a SendBlock `from` alone.
  kernels::cuda::RowCopy rows;

  /// To memory that has the layout of `rows.to`: a receiver's.
  [[nodiscard]] kernels::cuda::RowCopy copy_to(void* memory) const;
};

Outgoing outgoing(const SendBlock& send);
/// Without those of no bytes.
std::vector<Outgoing> outgoing(std::span<const SendBlock> sends);
std::vector<Outgoing> outgoing(std::span<const SendTokens> sends);

/// Puts those together that are to be, in their memory for that, all in one go.
void pack_if(const std::function<bool(const Outgoing&)>& is_to_be, std::span<Outgoing> sends,
             const kernels::cuda::Launch& launch);

/// Whether a copy engine should take it as it lies: as few, long rows.
bool suits_copy_engines(const Outgoing& one);

/// By a copy engine, to memory that this device reaches.
void copy_by_engine(const Outgoing& one, char* to, cudaStream_t stream);

}  // namespace ditattn::parallel
