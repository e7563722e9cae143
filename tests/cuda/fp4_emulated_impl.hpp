#pragma once

/// kernels/cuda/fp4_impl.hpp on GPUs without products of NVFP4: the same results but for the order of sums. Lanes fetch
/// what the instruction, as PTX ISA 8.7 has it, takes from the others. Included by .cu files alone, instead of that.

#include <cuda_fp8.h>

#include <cstdint>

namespace ditattn::kernels::cuda {

__device__ inline float e2m1_of(std::uint32_t word, int i) {
  const std::uint32_t code = word >> 4 * i & 15;
  const std::uint32_t size = code & 7;
  const float x = size < 2 ? 0.5F * static_cast<float>(size) : __uint_as_float((size + 2 * 126) << 22);
  return (code & 8) != 0 ? -x : x;
}

__device__ inline float e4m3_of(std::uint32_t word, int i) {
  __nv_fp8_e4m3 x;
  x.__x = static_cast<__nv_fp8_storage_t>(word >> 8 * i & 255);
  return static_cast<float>(x);
}

template <int kPair, int kThread>
__device__ inline void multiply_fp4(float* d, const std::uint32_t* a, const std::uint32_t* b, std::uint32_t row_scales,
                                    std::uint32_t column_scales) {
  constexpr unsigned all = 0xFFFFFFFFU;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int c = 0; c < 2; ++c) {
    const int column = 4 * (2 * (lane % 4) + c);  // the first lane of four that have it
    const std::uint32_t of_column = __shfl_sync(all, column_scales, column + kThread);
    for (int row = 0; row < 2; ++row) {
      const std::uint32_t of_row = __shfl_sync(all, row_scales, lane / 4 * 4 + 2 * kPair + row);
      float sum = 0;
      for (int thread = 0; thread < 4; ++thread) {
        for (int half = 0; half < 2; ++half) {
          const std::uint32_t x = __shfl_sync(all, a[2 * half + row], lane / 4 * 4 + thread);
          const std::uint32_t y = __shfl_sync(all, b[half], column + thread);
          const int group = (32 * half + 8 * thread) / 16;
          float product = 0;
          for (int i = 0; i < 8; ++i) product += e2m1_of(x, i) * e2m1_of(y, i);
          sum += product * e4m3_of(of_row, group) * e4m3_of(of_column, group);
        }
      }
      d[2 * row + c] += sum;
    }
  }
}

__device__ inline std::uint32_t to_e2m1(const float (&x)[8]) {
  std::uint32_t codes = 0;
  for (int i = 0; i < 8; ++i) {  // thresholds between neighbours; ties go to even codes
    const float size = fabsf(x[i]);
    const float ties_up[] = {0.75F, 1.75F, 3.5F};
    const float ties_down[] = {0.25F, 1.25F, 2.5F, 5.F};
    std::uint32_t code = 0;
    for (const float tie : ties_up) code += size >= tie ? 1 : 0;
    for (const float tie : ties_down) code += size > tie ? 1 : 0;
    codes |= (code | __float_as_uint(x[i]) >> 31 << 3) << 4 * i;
  }
  return codes;
}

__device__ inline std::uint32_t e4m3_codes(float first, float second) {
  return static_cast<std::uint32_t>(__nv_fp8_e4m3(first).__x) | static_cast<std::uint32_t>(__nv_fp8_e4m3(second).__x)
                                                                    << 8;
}

}  // namespace ditattn::kernels::cuda
