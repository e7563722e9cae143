#include "kernels/cpu/simd_avx512.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_bf16_avx512.hpp"
//
#include "kernels/cpu/sage3_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSage3Avx512Bf16 = sage3_kernel();

}  // namespace ditattn::kernels::cpu
