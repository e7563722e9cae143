#include "kernels/cpu/simd_avx2.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/byte_products_maddubs.hpp"
//
#include "kernels/cpu/dots_bytes_impl.hpp"
//
#include "kernels/cpu/sage_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSageAvx2 = sage_kernel<ByteValues>();
const TileKernel kSageWideAvx2 = sage_kernel<WideValues>();

}  // namespace ditattn::kernels::cpu
