#pragma once

/// mma.sync and what brings it its operands, from compute capability 8.0 on (products of e4m3 from 8.9 on), as PTX ISA
/// 8.0 has them. Included by .cu files alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace ditattn::kernels::cuda {

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

/// 16 bytes to shared memory; zeros where `bytes` is 0.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/// All that this thread asked for has come.
__device__ __forceinline__ void await_own_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// It has, and all of the block are here.
__device__ __forceinline__ void await_copies() {
  await_own_copies();
  __syncthreads();
}

/// Four 8 x 8 matrices of 16-bit elements, of which each thread gives a row's address.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(unsigned row, std::uint32_t (&r)[4]) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
}

/// d += a · b: 16 rows, 8 columns; a step is 16 elements of 16 bits or 32 of 8, of the type that is given.
__device__ __forceinline__ void multiply_step(float* d, const std::uint32_t* a, const std::uint32_t* b, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_step(float* d, const std::uint32_t* a, const std::uint32_t* b, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_step(int* d, const std::uint32_t* a, const std::uint32_t* b, std::int8_t) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ void multiply_step(float* d, const std::uint32_t* a, const std::uint32_t* b, __nv_fp8_e4m3) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

/// sums += a · b for kHalves times 16 rows, over kSteps steps of multiply_step. `load_a(step, half, r)` gives the rows'
/// operand, `load_b(step, column, r)` that of 16 columns, which is used for all rows.
template <class Number, int kSteps, int kColumns, int kHalves, class Sum, class LoadA, class LoadB>
__device__ __forceinline__ void multiply_halves(Sum (&sums)[kHalves][kColumns / 2], const LoadA& load_a,
                                                const LoadB& load_b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    std::uint32_t a[kHalves][4];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) load_a(step, h, a[h]);
#pragma unroll
    for (int n = 0; n < kColumns; n += 16) {
      std::uint32_t b[4];
      load_b(step, n, b);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        multiply_step(sums[h] + n / 2, a[h], b, Number{});
        multiply_step(sums[h] + n / 2 + 4, a[h], b + 2, Number{});
      }
    }
  }
}

}  // namespace ditattn::kernels::cuda
