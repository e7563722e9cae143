#pragma once

/// The table from levels to units, defined once per architecture: x86_levels.cpp, arm_levels.cpp.

#include "kernels/cpu/cpu_level.hpp"

namespace ditattn::kernels::cpu {

struct TileKernel;

/// What one level runs.
struct LevelKernels {
  const TileKernel* flash_f32;       ///< whatever the elements, in float32
  const TileKernel* flash_bf16_dot;  ///< bfloat16 through its own dot product; null: the level has none
  const TileKernel* sage;            ///< quantized
  const TileKernel* sage_wide;       ///< quantized but for V
  const TileKernel* sage3;           ///< FP4, emulated in float32
  const TileKernel* sage3_bf16_dot;  ///< in bfloat16's own dot product; null: the level has none
};

const LevelKernels& kernels_of(CpuLevel level);

}  // namespace ditattn::kernels::cpu
