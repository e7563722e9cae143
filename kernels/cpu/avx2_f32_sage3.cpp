#include "kernels/cpu/simd_avx2.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/sage3_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSage3Avx2 = sage3_kernel();

}  // namespace ditattn::kernels::cpu
