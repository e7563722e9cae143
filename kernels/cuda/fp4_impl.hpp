#pragma once

/// mma.sync of NVFP4 (kind mxf4nvf4, compute capability 12.x), as PTX ISA 8.7 has it. Included by .cu files alone.

#include <cstdint>

namespace ditattn::kernels::cuda {

/// d += (a · scales) · (b · scales): 16 rows, 8 columns, 64 numbers of e2m1, each 16 under a scale of e4m3. Scales of
/// rows are those that pair kPair of each four threads has, of columns those of thread kThread of four
/// (kernels/sage3_fp4_layout.hpp).
template <int kPair, int kThread>
__device__ __forceinline__ void multiply_fp4(float* d, const std::uint32_t* a, const std::uint32_t* b,
                                             std::uint32_t row_scales, std::uint32_t column_scales) {
  asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 {%0, %1, %2, "
      "%3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, %11}, {%12}, {0, %13};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(row_scales), "n"(kPair),
        "r"(column_scales), "n"(kThread));
}

/// The nearest e2m1 of eight numbers, ties to even, 6 at most: the first in the lowest bits.
__device__ __forceinline__ std::uint32_t to_e2m1(const float (&x)[8]) {
  std::uint32_t codes;
  asm("{\n.reg .b8 a, b, c, d;\ncvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\ncvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\ncvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\nmov.b32 %0, {a, b, c, d};\n}\n"
      : "=r"(codes)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
  return codes;
}

/// e4m3's codes of two numbers that it has, the first in the lower byte.
__device__ __forceinline__ std::uint32_t e4m3_codes(float first, float second) {
  std::uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(codes) : "f"(first), "f"(second));
  return codes;
}

}  // namespace ditattn::kernels::cuda
