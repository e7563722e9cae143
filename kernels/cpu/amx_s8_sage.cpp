#include "kernels/cpu/simd_avx512.hpp"
//
#include "kernels/cpu/matrix_amx.hpp"
//
#include "kernels/cpu/multiply_amx_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/dots_bytes_amx.hpp"
//
#include "kernels/cpu/sage_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const TileKernel kSageAmx = sage_kernel<ByteValues>();

}  // namespace ditattn::kernels::cpu
