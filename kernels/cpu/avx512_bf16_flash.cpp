#include "kernels/cpu/simd_avx512.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_bf16_avx512.hpp"
//
#include "kernels/cpu/flash_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kFlashAvx512Bf16 = {&scratch_floats, &block_floats, &pack_block, &run_tile, &multiply_rate};

}  // namespace ditattn::kernels::cpu
