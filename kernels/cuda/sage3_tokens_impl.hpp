#pragma once

/// How the kernels that quantize for SAGE_ATTN_3 read Q, K and V. Included by .cu files alone.

#include "kernels/cuda/flash_rows_impl.hpp"
#include "kernels/cuda/sage3_images.hpp"
#include "kernels/cuda/seen_keys_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

struct Sage3Arguments {
  AttentionProblem problem;
  Sage3Images images;
  Sage3Smoothing smoothing;
};

// Eight channels of a row, zeros past the head size; kAligned: they are read at once.
template <class T, bool kAligned>
__device__ __forceinline__ void read_channels(const T* row, int channel, int head_size, float (&x)[8]) {
  if constexpr (kAligned) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (channel < head_size) bits = *reinterpret_cast<const uint4*>(row + channel);
    const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = widen(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = channel + i < head_size ? widen(row[channel + i]) : 0;
  }
}

__device__ __forceinline__ bool are_finite(const float (&x)[8]) {
  float sum = 0;
#pragma unroll
  for (const float value : x) sum = fmaf(value, 0, sum);
  return sum == 0;
}

__device__ __forceinline__ float largest_of(const float (&x)[8]) {
  float largest = 0;
#pragma unroll
  for (const float value : x) largest = fmaxf(largest, fabsf(value));
  return largest;
}

// Whether `x` is true for all kLanes threads that have a row.
template <int kLanes>
__device__ __forceinline__ bool all_of_row(bool x) {
  const unsigned votes = __ballot_sync(kWarp, x);
  const unsigned row = (kLanes == 32 ? kWarp : (1U << kLanes % 32) - 1) << threadIdx.x % 32 / kLanes * kLanes % 32;
  return (votes & row) == row;
}

template <int kLanes>
__device__ __forceinline__ float largest_of_row(float x) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kWarp, x, distance));
  return x;
}

template <int kLanes>
__device__ __forceinline__ float sum_of_row(float x) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) x += __shfl_xor_sync(kWarp, x, distance);
  return x;
}

// --- Where rows of Q, K and V are ---

enum class Part : std::uint8_t { key, value, query };

// One of `Sage3Images::means`.
struct Source {
  Part part;
  int batch;
  int head;
  std::size_t index;

  __device__ Source(const AttentionProblem& p, unsigned i) : index(i) {
    const auto of_keys = static_cast<unsigned>(p.batch * p.kv_heads);
    part = i < of_keys ? Part::key : i < 2 * of_keys ? Part::value : Part::query;
    const unsigned heads = part == Part::query ? p.heads : p.kv_heads;
    const unsigned in_part = part == Part::query ? i - 2 * of_keys : i % of_keys;
    batch = static_cast<int>(in_part / heads);
    head = static_cast<int>(in_part % heads);
  }
};

// Up to 128 tokens of one head.
template <class T>
struct Tokens {
  const T* first = nullptr;
  std::int64_t stride = 0;
  __device__ const T* row(int token) const { return first + token * stride; }
};

// A block of keys of a K/V head, and which of them some row sees.
struct Sage3Block {
  const KeySegment* segment;
  int batch;
  int head;
  int first;  // key of the segment
  int block;  // of the head
  int begin;  // some row sees keys [begin, end) of it, masks aside
  int end;
  KeyMask mask;

  __device__ Sage3Block(const Sage3Arguments& a, int of_batch, int of_head, int index)
      : segment(&a.problem.key_segments[index >= a.images.key_blocks[0] ? 1 : 0]),
        batch(of_batch),
        head(of_head),
        block(index),
        mask(*segment, of_batch) {
    const int s = index >= a.images.key_blocks[0] ? 1 : 0;
    first = kSage3Keys * (index - (s == 1 ? a.images.key_blocks[0] : 0));
    const int2 seen = seen_keys(a.problem, a.images.seen, s, batch);
    begin = seen.x - first;
    end = seen.y - first;
  }
  __device__ bool sees(int key) const { return key >= begin && key < end && !mask.hides(first + key); }
  template <class T>
  __device__ Tokens<T> tokens(bool is_key) const {
    const Strides& strides = is_key ? segment->key_strides : segment->value_strides;
    return {static_cast<const T*>(is_key ? segment->key : segment->value) + batch * strides.batch +
                head * strides.head + first * strides.token,
            strides.token};
  }
};

// Rows of a query head from `first` on, as far as those of one segment go.
template <class T>
__device__ Tokens<T> query_tokens(const AttentionProblem& p, int batch, int head, int first) {
  const QuerySegment& segment = p.queries[p.num_queries == 2 && first >= p.queries[1].first_row ? 1 : 0];
  return {static_cast<const T*>(segment.data) + batch * segment.strides.batch + head * segment.strides.head +
              (first - segment.first_row) * segment.strides.token,
          segment.strides.token};
}

__device__ __forceinline__ const float* mean_of(const Sage3Images& images, std::size_t source) {
  return images.means + source * images.channels;
}

}  // namespace
}  // namespace ditattn::kernels::cuda
