#pragma once

/// How Hopper's exact kernel is cut for each head size.

#include "kernels/cuda/hopper_kernel.hpp"

namespace ditattn::kernels::cuda {

/// A row's sums depend on how its keys are cut into blocks: so those follow from the head size, whatever the batch and
/// the device; rows of a tile may follow from these. Measured against FlashAttention-3, the reasons are in
/// docs/kernels/flash_sm90.md; `make sweep-gpu` times others beside these. Beside each its shared memory, of which a
/// multiprocessor has 227 KiB. CMake reads the lines: a unit is compiled for each and dtype.
constexpr HopperTile kFlashSm90Tiles[] = {
    {64, 3, 128, 3, 100},   // 144 KiB
    {64, 2, 128, 3, 122},   // 128 KiB
    {64, 1, 128, 3, 175},   // 112 KiB
    {72, 4, 64, 3, 100},    // 224 KiB
    {80, 3, 96, 2, 100},    // 192 KiB
    {96, 2, 176, 2, 100},   // 208 KiB
    {128, 3, 64, 4, 100},   // 224 KiB
    {128, 2, 64, 4, 117},   // 192 KiB
    {128, 1, 64, 4, 182},   // 160 KiB
    {192, 2, 112, 2, 100},  // 216 KiB
    {256, 2, 80, 2, 100},   // 224 KiB
};

}  // namespace ditattn::kernels::cuda
