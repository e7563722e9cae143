#include "kernels/cpu/simd_sse2.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/dots_float.hpp"
//
#include "kernels/cpu/sage_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSageSse2 = sage_kernel<ByteValues>();
const TileKernel kSageWideSse2 = sage_kernel<WideValues>();

}  // namespace ditattn::kernels::cpu
