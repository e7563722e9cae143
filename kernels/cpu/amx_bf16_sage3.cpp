#include "kernels/cpu/simd_avx512.hpp"
//
#include "kernels/cpu/matrix_amx.hpp"
//
#include "kernels/cpu/multiply_amx_impl.hpp"
//
#include "kernels/cpu/operands_bf16_amx.hpp"
//
#include "kernels/cpu/sage3_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSage3Amx = sage3_kernel();

}  // namespace ditattn::kernels::cpu
