#pragma once

/// Rows of tokens from GPU to GPU by kernels of both, which tell each other by words in GPU memory when rows may be
/// written and when they have been. Rejected: flags in host memory that streams write and wait for, 8 µs before rows
/// and 5 after them (two H200s).

#include <cstdint>
#include <span>

#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/token_rows.hpp"

namespace ditattn::kernels::cuda {

inline constexpr std::size_t kMostPeers = 64;  ///< ranks, this one among them

/// What a rank's GPU has for the others to write to: zeros at first, `kPeerWordsBytes` long.
struct PeerWords {
  std::uint32_t* here = nullptr;          ///< this rank's
  std::uint32_t* there[kMostPeers] = {};  ///< the others', as this GPU reaches them
  const std::uint32_t* poison = nullptr;  ///< in host memory: where it is `kPeerPoison`, nothing is waited for
  int rank = 0;
};
inline constexpr std::size_t kPeerWordsBytes = (2 * kMostPeers + 1) * 128;
inline constexpr std::uint32_t kPeerPoison = 3;

/// Tells the ranks of `from` that they may write here, waits until those of `to` have said so too, copies what goes to
/// their memory, and tells them; beside that, copies what stays here. Bit r is rank r. Blocks stay until all of it is
/// done, few enough that other kernels have room.
void exchange_rows(std::span<const RowCopy> there, std::span<const RowCopy> here, const PeerWords& words,
                   std::uint64_t to, std::uint64_t from, const Launch& launch);

/// Waits until the ranks of `from` have told of their rows.
void await_rows(const PeerWords& words, std::uint64_t from, const Launch& launch);

}  // namespace ditattn::kernels::cuda
