#pragma once

/// What a tile of query rows is, sees and writes, for the kernels on matrix units: a thread has two rows' elements, as
/// mma.m16n8k16 and wgmma lay out sums: element 4 · j + 2 · i + c is row lane / 4 + 8 · i, column 8 · j + 2 · (lane %
/// 4) + c. Included by .cu files alone.

#include "kernels/cuda/mask_impl.hpp"

namespace ditattn::kernels::cuda {

constexpr float kLog2E = 1.44269504F;
constexpr float kLn2 = 0.693147181F;
constexpr unsigned kWarp = 0xFFFFFFFFU;

/// Rows of one query segment of one head.
struct Tile {
  int batch;
  int head;
  int kv_head;
  int segment;
  int row;        ///< in its segment
  int first_row;  ///< among all rows
  int rows;
};

/// Keys of a segment: all that rows of a tile see are in [begin, end); all of its rows see [full_begin, full_end).
struct SeenKeys {
  int begin;
  int end;
  int full_begin;
  int full_end;
};

/// What [begin, end) of a segment row `row` sees, masks aside.
__device__ inline int2 keys_of_row(const AttentionProblem& p, const KeySegment& segment, int batch, int row) {
  std::int64_t length = segment.keys;
  if (segment.lengths != nullptr) {
    length = clamp(segment.lengths[batch * segment.length_stride] - segment.length_offset, 0, length);
  }
  std::int64_t begin = 0;
  std::int64_t end = length;
  if (p.ranges != nullptr) {
    const std::int64_t* range = p.ranges + batch * p.range_batch_stride + 2 * static_cast<std::int64_t>(row);
    begin = clamp(range[0] - segment.first_key, 0, length);
    end = clamp(range[1] - segment.first_key, 0, length);
  } else if (p.causal) {
    end = clamp(row + p.causal_offset + 1 - segment.first_key, 0, length);
  }
  return begin < end ? make_int2(static_cast<int>(begin), static_cast<int>(end)) : make_int2(0, 0);
}

/// Takes a whole warp, and gives all of its threads the same.
__device__ inline SeenKeys find_seen(const AttentionProblem& p, const KeySegment& segment, const Tile& tile) {
  if (!p.causal && p.ranges == nullptr && segment.lengths == nullptr && segment.mask.data == nullptr) {
    const int keys = static_cast<int>(segment.keys);
    return {0, keys, 0, keys};
  }
  const int2 first = keys_of_row(p, segment, tile.batch, tile.first_row);
  const int2 last = keys_of_row(p, segment, tile.batch, tile.first_row + tile.rows - 1);
  SeenKeys seen{first.x, last.y, last.x, first.y};
  if (p.ranges != nullptr) {
    seen = {0x7FFFFFFF, 0, 0, 0x7FFFFFFF};
    for (int r = static_cast<int>(threadIdx.x % 32); r < tile.rows; r += 32) {
      const int2 keys = keys_of_row(p, segment, tile.batch, tile.first_row + r);
      if (keys.x < keys.y) {
        seen.begin = min(seen.begin, keys.x);
        seen.end = max(seen.end, keys.y);
      }
      seen.full_begin = max(seen.full_begin, keys.x);
      seen.full_end = min(seen.full_end, keys.y);
    }
    seen.begin = __reduce_min_sync(kWarp, seen.begin);
    seen.end = __reduce_max_sync(kWarp, seen.end);
    seen.full_begin = __reduce_max_sync(kWarp, seen.full_begin);
    seen.full_end = __reduce_min_sync(kWarp, seen.full_end);
  }
  if (segment.mask.data != nullptr && tile.first_row + tile.rows > segment.mask.first_row &&
      tile.first_row < segment.mask.first_row + segment.mask.rows) {
    seen.full_end = 0;
  }
  return seen;
}

/// The blocks of kKeys keys that a tile goes through, segment after segment, aligned to the segments' starts: so what a
/// row adds up does not depend on the rows beside it.
template <int kKeys>
class KeyBlocks {
 public:
  __device__ KeyBlocks(const AttentionProblem& p, const Tile& tile) {
    add(p, tile, 0, first_, count_, full_begin_, full_end_);
    add(p, tile, 1, second_, total_, second_full_begin_, second_full_end_);
    total_ += count_;
    second_ -= count_;
    second_full_begin_ += count_;
    second_full_end_ += count_;
  }
  __device__ int total() const { return total_; }
  __device__ int segment_of(int i) const { return i < count_ ? 0 : 1; }
  __device__ int key_of(int i) const { return ((i < count_ ? first_ : second_) + i) * kKeys; }
  /// Where block i hides nothing: the end of such blocks.
  __device__ int full_end(int i) const { return min(total_, i < count_ ? min(full_end_, count_) : second_full_end_); }
  /// Whether some row of the tile does not see some key of block i.
  __device__ bool hides(int i) const {
    return (i < full_begin_ || i >= full_end_) && (i < second_full_begin_ || i >= second_full_end_);
  }

 private:
  // Blocks of one segment: the first one's place, their count, and those, among them, that all rows see whole.
  __device__ static void add(const AttentionProblem& p, const Tile& tile, int s, int& first, int& count,
                             int& full_begin, int& full_end) {
    first = count = full_begin = full_end = 0;
    if (s >= p.num_key_segments) return;
    const SeenKeys seen = find_seen(p, p.key_segments[s], tile);
    if (seen.begin >= seen.end) return;
    first = seen.begin / kKeys;
    count = (seen.end + kKeys - 1) / kKeys - first;
    full_begin = (seen.full_begin + kKeys - 1) / kKeys - first;
    full_end = seen.full_end / kKeys - first;
  }

  int first_, count_, full_begin_, full_end_;
  int second_, total_, second_full_begin_, second_full_end_;
};

/// The keys of a segment that a thread's two rows see, masks aside.
struct RowLimits {
  int begin[2];
  int end[2];
  __device__ void find(const AttentionProblem& p, const KeySegment& segment, const Tile& tile, int warp_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + static_cast<int>(threadIdx.x % 32) / 4 + 8 * i;
      const int2 keys = row < tile.rows ? keys_of_row(p, segment, tile.batch, tile.first_row + row) : make_int2(0, 0);
      begin[i] = keys.x;
      end[i] = keys.y;
    }
  }
};

/// Hides the logits of keys from `first_key` on that are outside the limits.
template <int kCount>
__device__ __forceinline__ void hide(const RowLimits& limits, int first_key, float (&logits)[kCount]) {
  const int first = first_key + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int begin = limits.begin[i] - first;
    const int end = limits.end[i] - first;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& logit = logits[4 * j + 2 * i + c];
        logit = 8 * j + c < begin || 8 * j + c >= end ? -INFINITY : logit;
      }
    }
  }
}

/// A mask's element for a row and a key of its segment; 0 where the mask has no such row.
__device__ inline float mask_of(const KeySegment& segment, const Tile& tile, int row, int key) {
  const Mask& mask = segment.mask;
  const std::int64_t mask_row = row - mask.first_row;
  if (mask.data == nullptr || mask_row < 0 || mask_row >= mask.rows) return 0;
  return load_mask(mask, tile.batch * mask.strides.batch + mask_row * mask.strides.token +
                             tile.head * mask.strides.head + key * mask.key_stride);
}

__device__ inline float widen(unsigned char seen) { return seen != 0 ? 0 : -INFINITY; }

/// Adds a mask of elements M to what `hide` left of a thread's two rows: unscaled logits.
template <class M, int kCount>
__device__ __forceinline__ void add_mask(const AttentionProblem& p, const KeySegment& segment, const Tile& tile,
                                         int warp_row, int first_key, float (&logits)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float unscale = 1 / p.scale;
  const Mask& mask = segment.mask;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t row = tile.first_row + warp_row + lane / 4 + 8 * i - mask.first_row;
    if (row < 0 || row >= mask.rows || warp_row + lane / 4 + 8 * i >= tile.rows) continue;
    const M* elements = static_cast<const M*>(mask.data) + tile.batch * mask.strides.batch + row * mask.strides.token +
                        tile.head * mask.strides.head;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& logit = logits[4 * j + 2 * i + c];
        if (logit == -INFINITY) continue;  // hidden, maybe past the mask's end
        const float bias = widen(elements[(first_key + 8 * j + 2 * (lane % 4) + c) * mask.key_stride]);
        // A finite bias stays finite, as it hides nothing.
        logit = bias == -INFINITY ? -INFINITY : logit + fmaxf(bias * unscale, -3.4e38F);
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void add_mask(const AttentionProblem& p, const KeySegment& segment, const Tile& tile,
                                         int warp_row, int first_key, float (&logits)[kCount]) {
  if (segment.mask.data == nullptr) return;
  switch (segment.mask.type) {
    case ElementType::boolean:
      return add_mask<unsigned char>(p, segment, tile, warp_row, first_key, logits);
    case ElementType::float16:
      return add_mask<__half>(p, segment, tile, warp_row, first_key, logits);
    case ElementType::bfloat16:
      return add_mask<__nv_bfloat16>(p, segment, tile, warp_row, first_key, logits);
    default:
      return add_mask<float>(p, segment, tile, warp_row, first_key, logits);
  }
}

__device__ __forceinline__ float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The online softmax of a thread's two rows, to the base 2. Logits are taken relative to a reference that only has to
/// be near the maximum, and moves where it is not, so that most blocks leave the sums as they are, and, once there is
/// one, no maximum has to be known before the exponentials: too large sums tell of a reference that is too small.
struct Softmax {
  static constexpr float kSlack = 8;       ///< exact steps move a reference that is further below the maximum
  static constexpr float kLargest = 4096;  ///< of a thread's sum over a block, in other steps

  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  ///< this thread's columns

  /// Moves the references to the maxima where they are far below; leaves what sums so far have to be multiplied with.
  template <int kCount>
  __device__ __forceinline__ void find_reference(const float (&logits)[kCount], float scale, float (&rescale)[2]) {
    float top[2][4];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float& partial = top[k / 2 % 2][k / 4 % 2 * 2 + k % 2];
      partial = k < 8 ? logits[k] : fmaxf(partial, logits[k]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = fmaxf(fmaxf(top[i][0], top[i][1]), fmaxf(top[i][2], top[i][3]));
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 2)) * scale;
      const bool moves = x - reference[i] > kSlack;
      rescale[i] = moves ? exp2_unit(reference[i] - x) : 1;
      reference[i] = moves ? x : reference[i];
    }
  }

  /// Turns logits into probabilities, times 2^reference; a row that sees nothing has none.
  template <int kCount>
  __device__ __forceinline__ void exponentiate(float (&logits)[kCount], float scale) const {
    const float subtract[2] = {reference[0] == -INFINITY ? 0 : reference[0],
                               reference[1] == -INFINITY ? 0 : reference[1]};
#pragma unroll
    for (int k = 0; k < kCount; ++k) logits[k] = exp2_unit(fmaf(logits[k], scale, -subtract[k / 2 % 2]));
  }

  template <int kCount>
  __device__ __forceinline__ static void add(const float (&probabilities)[kCount], float (&total)[2]) {
    float partial[2][4];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float& x = partial[k / 2 % 2][k / 4 % 2 * 2 + k % 2];
      x = k < 8 ? probabilities[k] : x + probabilities[k];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) total[i] = (partial[i][0] + partial[i][1]) + (partial[i][2] + partial[i][3]);
  }

  /// Moves the references of rows of which a thread's total is too large by a power of two, and what was made with
  /// them. Infinite probabilities stay: such a row is computed again.
  template <int kCount>
  __device__ void lower(float (&probabilities)[kCount], float (&total)[2], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = total[i];
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
      const int exponent = (__float_as_int(x) >> 23) - 127;
      const bool moves = x > kLargest && exponent < 127;
      rescale[i] = moves ? __int_as_float((127 - exponent) << 23) : 1;
      reference[i] += moves ? static_cast<float>(exponent) : 0;
      total[i] *= rescale[i];
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) probabilities[k] *= rescale[k / 2 % 2];
  }

  /// Whether logits differ so much that a reference found in one block might be exceeded by more than float32 holds in
  /// another: a sample of them, a row at a time.
  template <int kCount>
  __device__ __forceinline__ static bool are_wild(const float (&logits)[kCount], float scale) {
    constexpr float wild = 20;
    float high[2];
    float low[2];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (k / 4 % 4 != 0) continue;
      const int i = k / 2 % 2;
      high[i] = k < 4 && k % 2 == 0 ? logits[k] : fmaxf(high[i], logits[k]);
      low[i] = k < 4 && k % 2 == 0 ? logits[k] : fminf(low[i], logits[k]);
    }
    return fmaxf(high[0] - low[0], high[1] - low[1]) * scale > wild;
  }

  /// Joins the four threads of a row.
  __device__ void finish() {
#pragma unroll
    for (float& x : sum) {
      x += __shfl_xor_sync(kWarp, x, 1);
      x += __shfl_xor_sync(kWarp, x, 2);
    }
  }
};

__device__ __forceinline__ std::uint32_t pack(float a, float b, __half) {
  const __half2 x = __floats2half2_rn(a, b);
  return reinterpret_cast<const std::uint32_t&>(x);
}
__device__ __forceinline__ std::uint32_t pack(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const std::uint32_t&>(x);
}

/// Four words of each of four neighbouring threads, transposed.
__device__ __forceinline__ void transpose_quad(std::uint32_t* w) {
  const bool odd = (threadIdx.x & 1) != 0;
  const bool high = (threadIdx.x & 2) != 0;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const std::uint32_t got = __shfl_xor_sync(kWarp, odd ? w[k] : w[k + 1], 1);
    w[k] = odd ? got : w[k];
    w[k + 1] = odd ? w[k + 1] : got;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::uint32_t got = __shfl_xor_sync(kWarp, high ? w[k] : w[k + 2], 2);
    w[k] = high ? got : w[k];
    w[k + 2] = high ? w[k + 2] : got;
  }
}

/// Whether a row of the warp has an output that is not finite. Where nothing is hidden, only too large sums make such
/// ones that should not be.
template <int kCount>
__device__ __forceinline__ bool are_broken(const Softmax& softmax, bool hides, const float (&out)[kCount]) {
  float x[4] = {softmax.sum[0] * 0, softmax.sum[1] * 0, 0, 0};
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

/// Writes a thread's part of two rows of the output, 16 bytes at a time, and their log-sum-exp.
template <class T, int kCount>
__device__ __forceinline__ void store_rows(const AttentionProblem& p, const Tile& tile, int warp_row,
                                           const Softmax& softmax, const float (&out)[kCount]) {
  constexpr int kSets = kCount / 16;  // of 32 channels
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + lane / 4 + 8 * i;
    const float factor = softmax.sum[i] == 0 ? 0 : __fdividef(1, softmax.sum[i]);
    std::uint32_t w[kCount / 4];
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) w[j] = pack(out[4 * j + 2 * i] * factor, out[4 * j + 2 * i + 1] * factor, T{});
#pragma unroll
    for (int set = 0; set < kSets; ++set) transpose_quad(w + 4 * set);
    if (row >= tile.rows) continue;
    T* target = out_row<T>(p, tile, row) + 8 * (lane % 4);
    const int channels = static_cast<int>(p.head_size) - 8 * (lane % 4);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const std::uint32_t* x = w + 4 * set;
      if (32 * set < channels) *reinterpret_cast<uint4*>(target + 32 * set) = make_uint4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll
    for (int j = 4 * kSets; j < kCount / 4; ++j) {
      const int channel = 8 * j + 2 * (lane % 4);
      if (channel < p.head_size) *reinterpret_cast<std::uint32_t*>(out_row<T>(p, tile, row) + channel) = w[j];
    }
    if (p.lse != nullptr && lane % 4 == 0) {
      *lse_of(p, tile, row) = softmax.sum[i] == 0 ? -INFINITY : (softmax.reference[i] + __log2f(softmax.sum[i])) * kLn2;
    }
  }
}

}  // namespace ditattn::kernels::cuda
