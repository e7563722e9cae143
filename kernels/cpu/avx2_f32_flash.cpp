#include "kernels/cpu/simd_avx2.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/flash_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kFlashAvx2 = {&scratch_floats, &block_floats, &pack_block, &run_tile, &multiply_rate};

}  // namespace ditattn::kernels::cpu
