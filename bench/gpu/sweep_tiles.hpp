#pragma once

/// Tiles of Hopper's flash attention that sweep.cpp times, and their kernels.

#include <span>

#include "kernels/cuda/flash_sm90.hpp"

namespace ditattn::kernels::cuda {

/// Lines as those of kFlashSm90Tiles, which CMake reads in the same way; the candidates of a head size there. The
/// library's own are among them: their ratios show the noise.
constexpr HopperTile kSweepTiles[] = {
    {64, 3, 128, 3, 100},   // 144 KiB
    {64, 2, 128, 3, 122},   // 128 KiB
    {64, 1, 128, 3, 175},   // 112 KiB
    {64, 3, 128, 2, 100},   // 112 KiB
    {64, 3, 112, 3, 100},   // 132 KiB
    {64, 3, 96, 4, 100},    // 144 KiB
    {64, 4, 64, 4, 100},    // 128 KiB
    {72, 4, 64, 3, 100},    // 224 KiB
    {72, 3, 64, 4, 100},    // 224 KiB
    {80, 3, 96, 2, 100},    // 192 KiB
    {80, 3, 64, 4, 100},    // 224 KiB
    {96, 2, 176, 2, 100},   // 208 KiB
    {96, 3, 96, 2, 100},    // 192 KiB
    {96, 3, 80, 3, 100},    // 216 KiB
    {96, 3, 64, 4, 100},    // 224 KiB
    {128, 3, 64, 4, 100},   // 224 KiB
    {128, 2, 64, 4, 117},   // 192 KiB
    {128, 1, 64, 4, 182},   // 160 KiB
    {128, 3, 64, 3, 100},   // 192 KiB
    {128, 3, 80, 3, 100},   // 216 KiB
    {128, 2, 128, 2, 100},  // 192 KiB
    {128, 2, 64, 5, 100},   // 224 KiB
    {192, 2, 112, 2, 100},  // 216 KiB
    {192, 2, 96, 2, 100},   // 192 KiB
    {192, 2, 80, 2, 100},   // 216 KiB
    {256, 2, 80, 2, 100},   // 224 KiB
    {256, 2, 64, 2, 100},   // 192 KiB
};

/// All of kSweepTiles that were compiled, in bfloat16, the same at every call.
std::span<const HopperKernel> built_sweep();

}  // namespace ditattn::kernels::cuda
