#include "tests/kernels/amx_emulated.hpp"
//
#include "kernels/cpu/simd_avx512.hpp"
//
#include "tests/kernels/matrix_emulated.hpp"
//
#include "kernels/cpu/multiply_amx_impl.hpp"
//
#include "kernels/cpu/operands_bf16_amx.hpp"
//
#include "kernels/cpu/sage3_tile_impl.hpp"

namespace ditattn::kernels::cpu::testing {

const TileKernel kSage3AmxEmulated = sage3_kernel();

}  // namespace ditattn::kernels::cpu::testing
