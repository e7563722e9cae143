#include "kernels/cpu/simd_avx512.hpp"
//
#include "kernels/cpu/flash_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const FlashKernel kFlashAvx512 = {&scratch_floats, &run_tile};

}  // namespace ditattn::kernels::cpu
