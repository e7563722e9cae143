#pragma once

/// How the kernels on matrix units write rows, and compute those again whose result is not finite. Included by .cu
/// files alone.

#include "kernels/cuda/flash_softmax_impl.hpp"

namespace ditattn::kernels::cuda {

__device__ __forceinline__ std::uint32_t pack(float a, float b, __half) {
  const __half2 x = __floats2half2_rn(a, b);
  return reinterpret_cast<const std::uint32_t&>(x);
}
__device__ __forceinline__ std::uint32_t pack(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const std::uint32_t&>(x);
}

/// A thread's probabilities of 16 keys and two rows, from `first_key` on, as the first operand of products of 16 bits.
template <class Element, int kCount>
__device__ __forceinline__ void pack_keys(const float (&probabilities)[kCount], int first_key, std::uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    r[i] = pack(probabilities[first_key / 2 + 2 * i], probabilities[first_key / 2 + 2 * i + 1], Element{});
  }
}

/// What a row's output has to be multiplied with; NaN where the row has to be computed again: its sum is beyond what
/// can be divided by, or its logits are so large that a reference is off by more than a few powers of two.
template <class Limits>
__device__ __forceinline__ float factor_of(const BasicSoftmax<Limits>& softmax, int i) {
  constexpr float most_sum = 8.5e37F;           // 2¹²⁶, above which __fdividef gives 0
  constexpr float most_reference = 16777216.F;  // 2²⁴, where float32's steps are 2
  const float size = fabsf(softmax.reference[i]);
  if (size > most_reference && size != INFINITY) return NAN;
  if (softmax.sum[i] == 0) return 0;
  return softmax.sum[i] < most_sum ? __fdividef(1, softmax.sum[i]) : NAN;
}

/// Whether a row of the warp has to be computed again: besides those above, where keys are hidden, such whose output is
/// not finite.
template <int kCount>
__device__ __forceinline__ bool are_broken(const float (&factor)[2], bool hides, const float (&out)[kCount]) {
  float x[4] = {factor[0] * 0, factor[1] * 0, 0, 0};
  if (hides) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k % 4] = fmaf(out[k], 0, x[k % 4]);
  }
  return __any_sync(kWarp, (x[0] + x[1]) + (x[2] + x[3]) != 0);  // NaN
}

template <class T>
__device__ T* out_row(const AttentionProblem& p, const Tile& tile, int row) {
  return static_cast<T*>(p.out) + tile.batch * p.out_strides.batch + (tile.first_row + row) * p.out_strides.token +
         tile.head * p.out_strides.head;
}

__device__ inline float* lse_of(const AttentionProblem& p, const Tile& tile, int row) {
  return p.lse + tile.batch * p.lse_strides.batch + (tile.first_row + row) * p.lse_strides.token +
         tile.head * p.lse_strides.head;
}

/// One row by one warp, key by key, without those that are hidden, for rows of which the matrix units' result is not
/// finite: what stands in hidden positions may be Inf or NaN, which 0 times is NaN, and logits may have risen by more
/// than float32 holds. A result that has to be Inf or NaN is found again, slowly.
template <class T, int kHead>
__device__ void compute_row(const AttentionProblem& p, const Tile& tile, int row) {
  constexpr int kSlices = (kHead + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const QuerySegment& segment = p.queries[tile.segment];
  const T* query = static_cast<const T*>(segment.data) + tile.batch * segment.strides.batch +
                   (tile.row + row) * segment.strides.token + tile.head * segment.strides.head;
  float q[kSlices];
  float out[kSlices];
#pragma unroll
  for (int j = 0; j < kSlices; ++j) {
    q[j] = 32 * j + lane < p.head_size ? widen(query[32 * j + lane]) : 0;
    out[j] = 0;
  }
  float top = -INFINITY;
  float sum = 0;
  const auto visit = [&](const KeySegment& keys, int key) {
    const T* k = static_cast<const T*>(keys.key) + tile.batch * keys.key_strides.batch +
                 tile.kv_head * keys.key_strides.head + key * keys.key_strides.token;
    const T* v = static_cast<const T*>(keys.value) + tile.batch * keys.value_strides.batch +
                 tile.kv_head * keys.value_strides.head + key * keys.value_strides.token;
    const float bias = __shfl_sync(kWarp, mask_of(keys, tile, tile.first_row + row, key), 0);
    if (bias == -INFINITY) return;
    float logit = 0;
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      if (32 * j + lane < p.head_size) logit = fmaf(q[j], widen(k[32 * j + lane]), logit);
    }
    for (int distance = 16; distance > 0; distance /= 2) logit += __shfl_xor_sync(kWarp, logit, distance);
    logit = logit * p.scale + bias;
    if (logit == -INFINITY && top == -INFINITY) return;
    const float higher = fmaxf(top, logit);  // not NaN; what follows is, then
    const float rescale = exp2f((top - higher) * kLog2E);
    const float probability = exp2f((logit - higher) * kLog2E);
    top = higher;
    sum = fmaf(sum, rescale, probability);
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      if (32 * j + lane < p.head_size) out[j] = fmaf(out[j], rescale, probability * widen(v[32 * j + lane]));
    }
  };
  for (int s = 0; s < p.num_key_segments; ++s) {
    const int2 keys = keys_of_row(p, p.key_segments[s], tile.batch, tile.first_row + row);
    const int end = __shfl_sync(kWarp, keys.y, 0);
    for (int key = __shfl_sync(kWarp, keys.x, 0); key < end; ++key) visit(p.key_segments[s], key);
  }
  T* target = out_row<T>(p, tile, row);
#pragma unroll
  for (int j = 0; j < kSlices; ++j) {
    if (32 * j + lane < p.head_size) narrow(sum == 0 ? 0 : out[j] / sum, target[32 * j + lane]);
  }
  if (p.lse != nullptr && lane == 0) *lse_of(p, tile, row) = sum == 0 ? -INFINITY : top + logf(sum);
}

/// Computes those of a warp's 16 rows again of which the output that was written is not finite.
template <class T, int kHead>
__device__ void mend_rows(const AttentionProblem& p, const Tile& tile, int warp_row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int rows = min(warp_row + 16, tile.rows);
  for (int row = warp_row; row < rows; ++row) {
    bool broken = false;
    for (int c = lane; c < p.head_size; c += 32) broken = broken || !isfinite(widen(out_row<T>(p, tile, row)[c]));
    if (__any_sync(kWarp, broken)) compute_row<T, kHead>(p, tile, row);
  }
}

/// Writes zeros and −∞ for a warp's rows, which see nothing.
template <class T>
__device__ void store_nothing(const AttentionProblem& p, const Tile& tile, int warp_row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int rows = min(warp_row + 16, tile.rows);
  for (int row = warp_row; row < rows; ++row) {
    for (int c = lane; c < p.head_size; c += 32) narrow(0, out_row<T>(p, tile, row)[c]);
    if (p.lse != nullptr && lane == 0) *lse_of(p, tile, row) = -INFINITY;
  }
}

/// Where 16 rows of a warp lie in shared memory: 64 channels beside each other are 128 bytes of a row, of which the
/// eight pieces of 16 bytes are swapped by the row, so that neither columns nor rows of pieces meet in a bank.
__device__ __forceinline__ unsigned piece_of(int row, int piece) {
  return static_cast<unsigned>(piece / 8 * 2048 + row * 128 + ((piece ^ row) & 7) * 16);
}

// Of shared memory.
__device__ __forceinline__ std::uint32_t load_word(unsigned address) {
  std::uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float load_float(unsigned address) { return __uint_as_float(load_word(address)); }
__device__ __forceinline__ void store_word(unsigned address, std::uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_piece(unsigned address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_piece(unsigned address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// A piece of each of 16 rows, as products leave them: `upper` of row lane / 4, `lower` of 8 rows below.
__device__ __forceinline__ void store_pieces(unsigned scratch, int piece, std::uint32_t upper, std::uint32_t lower) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(scratch + piece_of(lane % 16, piece)),
               "r"(upper), "r"(lower)
               : "memory");
#else
  const unsigned in_piece = lane % 4 * 4;
  store_word(scratch + piece_of(lane / 4, piece) + in_piece, upper);
  store_word(scratch + piece_of(lane / 4 + 8, piece) + in_piece, lower);
#endif
}

/// Writes a warp's 16 rows of the output to `scratch`, a warp's own address of shared memory, of 2,048 bytes per 64
/// channels.
template <class T, int kCount>
__device__ __forceinline__ void gather_rows(unsigned scratch, const float (&factor)[2], const float (&out)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    store_pieces(scratch, j, pack(out[4 * j] * factor[0], out[4 * j + 1] * factor[0], T{}),
                 pack(out[4 * j + 2] * factor[1], out[4 * j + 3] * factor[1], T{}));
  }
}

/// Writes 16 rows that were gathered, of `kPieces` times 8 channels, to the output.
template <class T, int kPieces>
__device__ __forceinline__ void store_gathered(const AttentionProblem& p, const Tile& tile, int warp_row,
                                               unsigned scratch) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  __syncwarp();
  T* target = out_row<T>(p, tile, warp_row);
  const int rows = tile.rows - warp_row;
  const int pieces = static_cast<int>(p.head_size) / 8;
#pragma unroll
  for (int i = 0; i < (16 * kPieces + 31) / 32; ++i) {
    const int row = (32 * i + lane) / kPieces;
    const int piece = (32 * i + lane) % kPieces;
    const uint4 x = load_piece(scratch + piece_of(row & 15, piece));
    if (row < rows && row < 16 && piece < pieces) {
      *reinterpret_cast<uint4*>(target + row * p.out_strides.token + 8 * piece) = x;
    }
  }
}

/// Writes the log-sum-exp of a row, which is the softmax's `i`-th; `adds`: adds it to what stands there.
template <class AnySoftmax>
__device__ __forceinline__ void store_lse_of(const AttentionProblem& p, const Tile& tile, int row,
                                             const AnySoftmax& softmax, int i, bool adds) {
  if (row >= tile.rows) return;
  float* lse = lse_of(p, tile, row);
  const float offset = adds ? *lse : 0;
  *lse = softmax.sum[i] == 0 ? -INFINITY : (softmax.reference[i] + __log2f(softmax.sum[i])) * kLn2 + offset;
}

/// Writes that of a warp's 16 rows.
template <class AnySoftmax>
__device__ __forceinline__ void store_lse(const AttentionProblem& p, const Tile& tile, int warp_row,
                                          const AnySoftmax& softmax, bool adds = false) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (p.lse == nullptr || lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) store_lse_of(p, tile, warp_row + lane / 4 + 8 * i, softmax, i, adds);
}

}  // namespace ditattn::kernels::cuda
