#pragma once

/// The AMX kernels with their instructions emulated (matrix_emulated.hpp), for CPUs that have AVX512-BF16 alone.

#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu::testing {

extern const TileKernel kFlashAmxEmulated;
extern const TileKernel kSageAmxEmulated;
extern const TileKernel kSage3AmxEmulated;

}  // namespace ditattn::kernels::cpu::testing
