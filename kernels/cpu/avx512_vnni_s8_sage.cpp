#include "kernels/cpu/simd_avx512.hpp"
//
#include "kernels/cpu/multiply_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/byte_products_vnni.hpp"
//
#include "kernels/cpu/dots_bytes_impl.hpp"
//
#include "kernels/cpu/sage_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSageAvx512Vnni = sage_kernel<ByteValues>();
const TileKernel kSageWideAvx512Vnni = sage_kernel<WideValues>();

}  // namespace ditattn::kernels::cpu
