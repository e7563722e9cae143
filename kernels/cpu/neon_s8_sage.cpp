#include "kernels/cpu/simd_neon.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/dots_float.hpp"
//
#include "kernels/cpu/sage_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSageNeon = sage_kernel<ByteValues>();
const TileKernel kSageWideNeon = sage_kernel<WideValues>();

}  // namespace ditattn::kernels::cpu
