#include "kernels/cpu/simd_sse2.hpp"
//
#include "kernels/cpu/flash_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const FlashKernel kFlashSse2 = {&scratch_floats, &run_tile};

}  // namespace ditattn::kernels::cpu
