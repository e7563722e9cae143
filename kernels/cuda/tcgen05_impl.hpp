#pragma once

/// tcgen05 of compute capability 10.0 and 10.3, as PTX ISA 8.7 has it: products of NVFP4 of operands in shared memory,
/// whose sums and scales are in tensor memory. Not the toolkit's cuda::ptx: CUDA 13.0's knows 10.0 alone. Included by
/// .cu files alone. Compiled, never run here.

#include <cstdint>

namespace ditattn::kernels::cuda {

/// What kernels call; tests have another one of the same members (tests/cuda/tcgen05_emulated_impl.hpp). Members are
/// for whole warps. What a warp asks for asynchronously, its first lane does.
struct Tcgen05 {
  /// Columns of tensor memory; their address is written to shared memory. Waits while other blocks have them.
  template <int kColumns>
  __device__ __forceinline__ static void allocate(unsigned to) {
    asm volatile(
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;\n"
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::"r"(to),
        "n"(kColumns)
        : "memory");
  }
  template <int kColumns>
  __device__ __forceinline__ static void release(std::uint32_t address) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(kColumns) : "memory");
  }

  /// 32 rows of 16 bytes to four columns of each quarter of the lanes; before the products that follow.
  __device__ __forceinline__ static void copy_scales(std::uint32_t to, std::uint64_t from) {
    if (threadIdx.x % 32 != 0) return;
    asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(to), "l"(from) : "memory");
  }

  /// sums = a · b, or with `adds` sums += a · b.
  __device__ __forceinline__ static void multiply(std::uint32_t sums, std::uint64_t a, std::uint64_t b,
                                                  std::uint32_t instruction, std::uint32_t a_scales,
                                                  std::uint32_t b_scales, bool adds) {
    if (threadIdx.x % 32 != 0) return;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X [%0], %1, %2, %3, [%4], [%5], p;\n}\n" ::"r"(
            sums),
        "l"(a), "l"(b), "r"(instruction), "r"(a_scales), "r"(b_scales), "r"(static_cast<int>(adds))
        : "memory");
  }

  /// Arrives at a barrier of shared memory when all that was asked for before is done.
  __device__ __forceinline__ static void commit(unsigned barrier) {
    if (threadIdx.x % 32 != 0) return;
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier)
                 : "memory");
  }

  /// 32 columns of a thread's own lane: `from` is of the warp's first, 32 · (warp % 4). Waits for them.
  __device__ __forceinline__ static void load(std::uint32_t from, float (&x)[32]) {
    asm volatile(
        "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];\n"
        "tcgen05.wait::ld.sync.aligned;"
        : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]), "=f"(x[4]), "=f"(x[5]), "=f"(x[6]), "=f"(x[7]), "=f"(x[8]),
          "=f"(x[9]), "=f"(x[10]), "=f"(x[11]), "=f"(x[12]), "=f"(x[13]), "=f"(x[14]), "=f"(x[15]), "=f"(x[16]),
          "=f"(x[17]), "=f"(x[18]), "=f"(x[19]), "=f"(x[20]), "=f"(x[21]), "=f"(x[22]), "=f"(x[23]), "=f"(x[24]),
          "=f"(x[25]), "=f"(x[26]), "=f"(x[27]), "=f"(x[28]), "=f"(x[29]), "=f"(x[30]), "=f"(x[31])
        : "r"(from)
        : "memory");
  }

  /// Around what orders threads: a barrier.
  __device__ __forceinline__ static void fence_before() {
    asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
  }
  __device__ __forceinline__ static void fence_after() {
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
  }
};

}  // namespace ditattn::kernels::cuda
