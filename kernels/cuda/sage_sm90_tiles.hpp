#pragma once

/// How Hopper's quantized kernel is cut for each head size.

#include "kernels/cuda/hopper_kernel.hpp"

namespace ditattn::kernels::cuda {

/// As kFlashSm90Tiles; docs/kernels/sage_sm90.md has the reasons. Blocks are of a multiple of 32 keys, 128 at most.
/// With one or two warpgroups, Q is held in registers.
constexpr HopperTile kSageSm90Tiles[] = {
    {64, 3, 128, 3, 100},  // 109 KiB
    {96, 2, 128, 3, 100},  // 148 KiB
    {128, 3, 64, 4, 100},  // 185 KiB
    {256, 2, 64, 2, 100},  // 225 KiB
};

}  // namespace ditattn::kernels::cuda
