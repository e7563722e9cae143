#include "kernels/cpu/simd_avx512.hpp"
//
#include "kernels/cpu/flash_elements_impl.hpp"
//
#include "kernels/cpu/operands_bf16_avx512.hpp"
//
#include "kernels/cpu/flash_multiply_impl.hpp"
//
#include "kernels/cpu/flash_softmax_impl.hpp"
//
#include "kernels/cpu/flash_tile_impl.hpp"

namespace ditattn::kernels::cpu {

const FlashKernel kFlashAvx512Bf16 = {&scratch_floats, &run_tile, &multiply_rate};

}  // namespace ditattn::kernels::cpu
