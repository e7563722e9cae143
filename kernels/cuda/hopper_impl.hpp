#pragma once

/// Hopper's asynchronous units (sm_90a), as PTX ISA 8.0 has them: mbarriers, tensor copies, warpgroup matrix products.
/// Included by .cu files alone. Addresses are of shared memory, in bytes.

#include <cuda.h>

#include <cstdint>

namespace ditattn::kernels::cuda::hopper {

using Address = std::uint32_t;

__device__ __forceinline__ Address address_of(const void* shared) {
  return static_cast<Address>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void init_barrier(Address barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Arrives, and expects `bytes` of copies before the phase ends.
__device__ __forceinline__ void arrive_expect(Address barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Expects `bytes` of copies more before the phase ends.
__device__ __forceinline__ void expect_more(Address barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(Address barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Waits for the end of the phase of this parity.
__device__ __forceinline__ void wait(Address barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra "
      "again;\ndone:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// Clusters of blocks of threads, all of which arrive and wait: what was written before is seen after.
__device__ __forceinline__ void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/// Where a block of the cluster has what stands here in this one's shared memory.
template <class T>
__device__ __forceinline__ const T* of_rank(const T* shared, unsigned rank) {
  std::uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<const T*>(address);
}

/// A box of a (channel, token, head, batch) tensor to shared memory; positions outside it become zeros.
__device__ __forceinline__ void copy_box(Address to, const CUtensorMap* map, Address barrier, int channel, int token,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(channel), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

/// Contiguous bytes to shared memory; both addresses and the count are multiples of 16.
__device__ __forceinline__ void copy_bytes(Address to, const void* from, int bytes, Address barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

/// A box of shared memory to a (channel, token, head, batch) tensor, but for positions outside it, by the threads that
/// have `copies`: no branch, for consumers' loops.
__device__ __forceinline__ void copy_box_out(bool copies, const CUtensorMap* map, Address from, int channel, int token,
                                             int head, int batch) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n@p cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, "
      "%4, %5}], [%1];\n}\n" ::"l"(map),
      "r"(from), "r"(channel), "r"(token), "r"(head), "r"(batch), "r"(static_cast<int>(copies))
      : "memory");
}

/// Waits until what this thread copied out has been read, and shared memory may be written again.
__device__ __forceinline__ void wait_read_out() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

/// Waits until what this thread copied out can be read where it was copied to.
__device__ __forceinline__ void wait_copied_out() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

/// Fetches a map, which the first copy would wait for.
__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Lets the next kernel of the stream, if it was launched to overlap, start. Like the next, it does nothing
/// before Hopper, where no launch overlaps another.
__device__ __forceinline__ void start_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits for the kernel before to end, if this one was launched to overlap it: before memory is read or written.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Orders this thread's accesses to shared memory before copies that come after.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Named barriers of `threads` threads.
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// Whether `x` is true for one of the threads at a named barrier.
__device__ __forceinline__ bool any_named(int barrier, int threads, bool x) {
  int result;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.b32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.b32 %0, 1, 0, q;\n}\n"
               : "=r"(result)
               : "r"(barrier), "r"(threads), "r"(static_cast<int>(x))
               : "memory");
  return result != 0;
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

/// A matrix operand of rows of 128 bytes, swizzled as copy_box writes them; `panel_bytes` is from one 64 channels to
/// the next where an operand has its N contiguous. Adding bytes / 16 moves it.
__device__ __forceinline__ std::uint64_t describe(Address address, int panel_bytes) {
  constexpr std::uint64_t swizzle_128 = 1ULL << 62;
  constexpr std::uint64_t eight_rows = 1024 / 16;
  return (swizzle_128 | eight_rows << 32 | static_cast<std::uint64_t>(panel_bytes / 16) << 16) +
         (address & 0x3FFFF) / 16;
}

/// A matrix operand of rows of 32, 64 or 128 bytes with the reduction contiguous, swizzled as sage_place has them.
__device__ __forceinline__ std::uint64_t describe_bytes(Address address, int row_bytes) {
  const std::uint64_t swizzle = (row_bytes == 128 ? 1ULL : row_bytes == 64 ? 2ULL : 3ULL) << 62;
  return (swizzle | static_cast<std::uint64_t>(8 * row_bytes / 16) << 32) + (address & 0x3FFFF) / 16;
}

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most `kPending` committed groups of products are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Does nothing, after `x` is known and before the waits that follow: the compiler moves those up as far as it can, and
/// what comes before them in the text would come after. (A store for one value of x, as a sign could be known.)
/// `unused` is an address of shared memory that may be written.
__device__ __forceinline__ void hold_waits_for(float x, Address unused) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.f32 p, %0, 0f7F7FFFFF;\n@p st.shared.f32 [%1], %0;\n}\n" ::"f"(x), "r"(unused)
               : "memory");
}

/// Keeps uses of registers that products write in place among the waits.
template <class T, int kCount>
__device__ __forceinline__ void pin(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(T) == 4 && T(0.5F) != T(0)) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

}  // namespace ditattn::kernels::cuda::hopper
