#pragma once

/// How SAGE_ATTN_3's emulation on Hopper is cut for each head size.

#include "kernels/cuda/hopper_kernel.hpp"

namespace ditattn::kernels::cuda {

/// Blocks are of kSage3Keys, as the arithmetic has it. Above 128 there are no registers for them: sage3_sm80
/// takes those head sizes. CMake reads the lines: a unit is compiled for each and dtype.
constexpr HopperTile kSage3Sm90Tiles[] = {
    {64, 2, 128, 2, 100},
    {128, 2, 128, 2, 100},
};

}  // namespace ditattn::kernels::cuda
