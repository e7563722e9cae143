#pragma once

/// What the warp-specialized kernels for Hopper have in common. Included by .cu files alone.

#include "kernels/cuda/flash_tile_impl.hpp"
#include "kernels/cuda/hopper_impl.hpp"

namespace ditattn::kernels::cuda {

/// Registers of a thread of the producer's warpgroup and of `kGroups` others: of the 64 K of a multiprocessor, in
/// multiples of 8; a block redistributes what it starts with.
template <int kGroups>
struct WarpgroupRegisters {
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kStart = 65536 / kThreads / 8 * 8;
  static constexpr int kProducer = kGroups > 3 ? 24 : kGroups < 3 ? 40 : 32;
  static constexpr int kShare = (kThreads * kStart - 128 * kProducer) / (128 * kGroups) / 8 * 8;
  static constexpr int kConsumer = kShare < 240 ? kShare : 240;
};

/// The tiles of one block of threads, one after the other, and what keys they go through; the launch before is waited
/// for at the first. Where the longest come first, every second round goes backwards, which evens out the blocks' work.
/// `Arguments` have a problem, its order of tiles, and `differs`: whether rows of a batch entry see different keys.
template <class Config, class Arguments>
class TileWalk {
 public:
  __device__ explicit TileWalk(const Arguments& arguments) : a_(arguments) {}

  __device__ const Tile& tile() const { return tile_; }
  __device__ const KeyBlocks<Config::kKeys>& blocks() const { return blocks_; }

  __device__ bool next() {
    const bool backwards = a_.order.longest_first && (round_ & 1) != 0;
    const unsigned index = round_ * gridDim.x + (backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    const bool first = round_ == 0;
    ++round_;
    if (index >= a_.order.total_tiles) return false;
    const int batch = tile_.batch;
    tile_ = tile_at<Config::kRows>(a_.problem, a_.order, index);
    if (first) hopper::wait_for_launch_before();
    if (a_.differs || tile_.batch != batch) blocks_ = KeyBlocks<Config::kKeys>(a_.problem, tile_);
    return true;
  }

 private:
  const Arguments& a_;
  Tile tile_{.batch = -1};
  KeyBlocks<Config::kKeys> blocks_;
  unsigned round_ = 0;
};

/// Turns of a block's warpgroups that compute: a group's products are issued between its own barrier and the arrival at
/// the next one's. None where there is but one.
template <int kGroups>
struct WarpgroupTurns {
  int group;
  __device__ void begin() const {
    if (group == kGroups - 1) pass();
  }
  __device__ void take() const {
    if constexpr (kGroups > 1) hopper::sync_named(1 + group, 256);
  }
  __device__ void pass() const {
    if constexpr (kGroups > 1) hopper::arrive_named(1 + (group + 1) % kGroups, 256);
  }
};

/// A ring of stages: which one is next, and the parity of its phase.
template <int kStages>
struct RingPlace {
  int stage = 0;
  int parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// A warp has read what a stage holds.
__device__ __forceinline__ void release(hopper::Address empty) {
  if (threadIdx.x % 32 == 0) hopper::arrive(empty);
}

}  // namespace ditattn::kernels::cuda
