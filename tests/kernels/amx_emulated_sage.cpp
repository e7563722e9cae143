#include "tests/kernels/amx_emulated.hpp"
//
#include "kernels/cpu/simd_avx512.hpp"
//
#include "tests/kernels/matrix_emulated.hpp"
//
#include "kernels/cpu/multiply_amx_impl.hpp"
//
#include "kernels/cpu/operands_f32.hpp"
//
#include "kernels/cpu/dots_bytes_amx.hpp"
//
#include "kernels/cpu/sage_tile_impl.hpp"

namespace ditattn::kernels::cpu::testing {

const TileKernel kSageAmxEmulated = sage_kernel<ByteValues>();

}  // namespace ditattn::kernels::cpu::testing
