#pragma once

/// The kernels of sage_quantize.cu, which alone includes this.

#include <cuda_fp8.h>

#include "kernels/cuda/flash_tile_impl.hpp"
#include "kernels/cuda/hopper_impl.hpp"
#include "kernels/cuda/sage_quantize.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpRows = 16;
constexpr int kMostThreads = 256;  // of a block of 128 keys
constexpr float kMostByte = 127;
constexpr float kMostFp8 = 448;
constexpr float kLeast = 2e-36F;  // below, and above the next, 1 / x cannot be had: such rows are left to exact steps
constexpr float kMost = 8e37F;

struct Arguments {
  AttentionProblem problem;
  SageQuantization quantization;
  SageImages images;
};

// Item `index` of those of all heads: heads are the fastest, as tokens lie in memory, where neighbours are read
// together.
struct OfHead {
  int batch;
  int head;
  int item;
  std::size_t head_index;
  std::size_t place;  // in the images, where a head's items lie together

  __device__ OfHead(unsigned index, std::int64_t all_heads, int items) {
    const auto heads = static_cast<unsigned>(all_heads);
    const unsigned row = index / heads;
    head = static_cast<int>(index - row * heads);
    batch = static_cast<int>(row / items);
    item = static_cast<int>(row) - batch * items;
    head_index = static_cast<std::size_t>(batch) * heads + head;
    place = head_index * items + item;
  }
};

// Eight channels of a token.
template <class T>
struct alignas(16) Eight {
  T x[8];
};

template <class T, bool kAligned>
__device__ Eight<T> load_eight(const T* row, int channel, int head_size) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Eight<T>*>(row + channel);
  } else {
    Eight<T> eight{};
    for (int i = 0; i < 8 && channel + i < head_size; ++i) eight.x[i] = row[channel + i];
    return eight;
  }
}

// A warp's 16 of a tile's tokens: `kLanes` neighbouring threads have one, eight channels each. Tokens outside [begin,
// end) are the nearest of those, channels past the tensor's the first: no product sees them.
template <class T, int kLanes, bool kAligned>
struct WarpTokens {
  static constexpr int kCount = kLanes / 2;  // of a thread
  Eight<T> eights[kCount];
  bool has_channels;

  __device__ static int lane() { return static_cast<int>(threadIdx.x % kLanes); }
  __device__ static int token(int i) {
    return kWarpRows * static_cast<int>(threadIdx.x / 32) + 32 / kLanes * i +
           static_cast<int>(threadIdx.x % 32) / kLanes;
  }

  __device__ WarpTokens(const T* data, std::int64_t stride, int first, int begin, int end, int head_size)
      : has_channels(8 * lane() < head_size) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = min(max(first + token(i), begin), end - 1);
      eights[i] = load_eight<T, kAligned>(data + at * stride, has_channels ? 8 * lane() : 0, head_size);
    }
  }
};

// The larger size; NaN if one is.
__device__ float larger(float largest, float x) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(largest), "f"(fabsf(x)));
  return y;
}

// Two numbers of 16 bits in the order of their sizes, NaN the largest.
__device__ std::uint32_t size_of(std::uint32_t pair) { return pair & 0x7FFF7FFF; }

template <class T>
__device__ std::uint32_t sizes_of(const Eight<T>& eight) {
  const auto& words = reinterpret_cast<const uint4&>(eight);
  return __vmaxu2(__vmaxu2(size_of(words.x), size_of(words.y)), __vmaxu2(size_of(words.z), size_of(words.w)));
}

// The largest of `kLanes` neighbouring threads.
template <int kLanes>
__device__ std::uint32_t largest_of_lanes(std::uint32_t sizes) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    sizes = __vmaxu2(sizes, __shfl_xor_sync(kWarp, sizes, distance));
  }
  return sizes;
}
template <int kLanes>
__device__ float largest_of_lanes(float largest) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    largest = larger(largest, __shfl_xor_sync(kWarp, largest, distance));
  }
  return largest;
}

template <class T>
__device__ float to_number(std::uint32_t sizes) {
  const auto bits = static_cast<std::uint16_t>(__vmaxu2(sizes, sizes >> 16));
  return widen(reinterpret_cast<const T&>(bits));
}

// What numbers of this size are multiplied with, for the largest to become `most`; 0 where that cannot be.
__device__ float inverse_of(float largest, float most) {
  return largest > kLeast && largest < kMost ? most * __frcp_rn(largest) : 0;
}
// And by what they get their size again: NaN, which makes rows be computed again, where they cannot.
__device__ float scale_of(float largest, float most) {
  return largest == 0 || (largest > kLeast && largest < kMost) ? largest * (1 / most) : NAN;
}

// Whole numbers nearest to eight, as bytes: what is added moves them to the lowest bits.
template <class Number>
__device__ uint2 to_bytes(const Number& number) {
  constexpr float kMove = 12582912;  // 1.5 · 2²³
  std::uint32_t x[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) x[c] = __float_as_uint(number(c) + kMove);
  const auto join = [&](int c) {
    return __byte_perm(__byte_perm(x[c], x[c + 1], 0x0040), __byte_perm(x[c + 2], x[c + 3], 0x0040), 0x5410);
  };
  return make_uint2(join(0), join(4));
}

// Keys of a segment that some row of a batch entry sees.
__device__ int2 seen_keys(const Arguments& a, int s, int batch) {
  const AttentionProblem& p = a.problem;
  const KeySegment& segment = p.key_segments[s];
  std::int64_t begin = 0;
  std::int64_t end = segment.keys;
  if (segment.lengths != nullptr) {
    end = clamp(segment.lengths[batch * segment.length_stride] - segment.length_offset, 0, end);
  }
  if (p.ranges != nullptr) {
    begin = clamp(a.images.seen[2 * batch] - segment.first_key, 0, end);
    end = clamp(a.images.seen[2 * batch + 1] - segment.first_key, begin, end);
  } else if (p.causal) {
    end = clamp(p.rows + p.causal_offset - segment.first_key, 0, end);
  }
  return make_int2(static_cast<int>(begin), static_cast<int>(end));
}

// Which keys of a segment a mask over keys hides, for all rows of a batch entry.
class KeyMask {
 public:
  __device__ KeyMask(const KeySegment& segment, int batch) : stride_(segment.mask.key_stride) {
    if (segment.mask.data != nullptr) {
      data_ = static_cast<const unsigned char*>(segment.mask.data) + batch * segment.mask.strides.batch;
    }
  }
  __device__ bool exists() const { return data_ != nullptr; }
  __device__ bool hides(int key) const { return data_ != nullptr && data_[key * stride_] == 0; }

 private:
  const unsigned char* data_ = nullptr;
  std::int64_t stride_;
};

// What ranges let some row of a batch entry see.
__global__ void find_seen(const __grid_constant__ Arguments a) {
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  __shared__ unsigned long long ends[2];
  const AttentionProblem& p = a.problem;
  if (threadIdx.x == 0) ends[0] = ~0ULL, ends[1] = 0;
  __syncthreads();
  for (std::int64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
    const std::int64_t* range = p.ranges + blockIdx.x * p.range_batch_stride + 2 * row;
    if (range[0] >= range[1]) continue;
    atomicMin(&ends[0], static_cast<unsigned long long>(max(range[0], std::int64_t{0})));
    atomicMax(&ends[1], static_cast<unsigned long long>(max(range[1], std::int64_t{0})));
  }
  __syncthreads();
  if (threadIdx.x < 2)
    a.images.seen[2 * blockIdx.x + threadIdx.x] = static_cast<std::int64_t>(min(ends[threadIdx.x], 1ULL << 62));
}

template <class T, int kLanes, bool kAligned>
__device__ void quantize_query(const Arguments& a, unsigned index) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  constexpr int kChannels = 8 * kLanes;
  const AttentionProblem& p = a.problem;
  const OfHead of(index, p.heads, a.images.query_tiles[0] + a.images.query_tiles[1]);
  const int s = of.item >= a.images.query_tiles[0] ? 1 : 0;
  const int first_row = kSageQueryRows * (of.item - (s == 1 ? a.images.query_tiles[0] : 0));
  const QuerySegment& segment = p.queries[s];
  const T* data =
      static_cast<const T*>(segment.data) + of.batch * segment.strides.batch + of.head * segment.strides.head;
  const Tokens tokens(data, segment.strides.token, first_row, 0, static_cast<int>(rows_of(p, s)),
                      static_cast<int>(p.head_size));
  std::uint32_t sizes[Tokens::kCount];
  std::uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    sizes[i] = largest_of_lanes<kLanes>(tokens.has_channels ? sizes_of(tokens.eights[i]) : 0);
    most = __vmaxu2(most, sizes[i]);
  }
  if (!a.quantization.per_thread) most = largest_of_lanes<32>(most);
  std::int8_t* image = a.images.query + of.place * kSageQueryRows * kChannels;
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    const float largest = to_number<T>(a.quantization.per_thread ? sizes[i] : most);
    const float inverse = tokens.has_channels ? copysignf(inverse_of(largest, kMostByte), p.scale) : 0;
    const int row = Tokens::token(i);
    *reinterpret_cast<uint2*>(image + sage_place(kSageQueryRows, sage_row_bytes(kChannels), row, 8 * Tokens::lane())) =
        to_bytes([&](int c) { return widen(tokens.eights[i].x[c]) * inverse; });
    if (Tokens::lane() != 0) continue;
    a.images.query_scale[of.place * kSageQueryRows + row] = scale_of(largest, kMostByte) * fabsf(p.scale) * kLog2E;
  }
}

// Sums over a chunk of keys: of K, or of V with the largest and least.
template <class T, int kLanes, bool kAligned, bool kExtremes>
__device__ void add_up(const Arguments& a, unsigned index) {
  constexpr int kChannels = 8 * kLanes;
  constexpr int kAtOnce = kThreads / kLanes;
  constexpr int kKinds = kExtremes ? 3 : 1;
  __shared__ float shared[kKinds][kAtOnce][kChannels];
  const AttentionProblem& p = a.problem;
  const OfHead of(index, p.kv_heads, a.images.chunks[0] + a.images.chunks[1]);
  const int s = of.item >= a.images.chunks[0] ? 1 : 0;
  const KeySegment& segment = p.key_segments[s];
  const Strides& strides = kExtremes ? segment.value_strides : segment.key_strides;
  const T* data = static_cast<const T*>(kExtremes ? segment.value : segment.key) + of.batch * strides.batch +
                  of.head * strides.head;
  const int2 seen = seen_keys(a, s, of.batch);
  const int first = a.images.chunk_keys * (of.item - (s == 1 ? a.images.chunks[0] : 0));
  const int begin = max(first, seen.x);
  const int end = min(first + a.images.chunk_keys, seen.y);
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int group = static_cast<int>(threadIdx.x / kLanes);
  const bool has_channels = 8 * lane < p.head_size;  // else they are the first ones

  float sum[8] = {};
  float high[8];
  float low[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) high[c] = -INFINITY, low[c] = INFINITY;
  // Keys by their place in the chunk: their order is the same whatever is seen.
  const int skipped = max(begin - first - group + kAtOnce - 1, 0) / kAtOnce;
  const KeyMask mask(segment, of.batch);
  int count = 0;
  const auto add = [&](int key) {
    const Eight<T> eight =
        load_eight<T, kAligned>(data + key * strides.token, has_channels ? 8 * lane : 0, static_cast<int>(p.head_size));
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float x = widen(eight.x[c]);
      sum[c] += x;
      if constexpr (kExtremes) high[c] = fmaxf(high[c], x), low[c] = fminf(low[c], x);
    }
    ++count;
  };
  const int start = first + group + skipped * kAtOnce;
  if (mask.exists()) {
    for (int key = start; key < end; key += kAtOnce) {
      if (!mask.hides(key)) add(key);
    }
  } else {
#pragma unroll 8
    for (int key = start; key < end; key += kAtOnce) add(key);
  }
  if constexpr (!kExtremes) {
    __shared__ int counts;
    if (threadIdx.x == 0) counts = 0;
    __syncthreads();
    if (lane == 0) atomicAdd(&counts, count);
    __syncthreads();
    if (threadIdx.x == 0) a.images.key_counts[of.place] = counts;
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    shared[0][group][8 * lane + c] = sum[c];
    if constexpr (kExtremes) shared[1][group][8 * lane + c] = high[c], shared[2][group][8 * lane + c] = low[c];
  }
  __syncthreads();
  float* sums = (kExtremes ? a.images.value_sums : a.images.key_sums) + of.place * kKinds * kChannels;
  for (int c = static_cast<int>(threadIdx.x); c < kChannels; c += kThreads) {
    float total = 0;
    float highest = -INFINITY;
    float lowest = INFINITY;
    for (int g = 0; g < kAtOnce; ++g) {
      total += shared[0][g][c];
      if constexpr (kExtremes) highest = fmaxf(highest, shared[1][g][c]), lowest = fminf(lowest, shared[2][g][c]);
    }
    const bool is_channel = c < p.head_size;
    sums[c] = is_channel ? total : 0;
    if constexpr (kExtremes) {
      sums[kChannels + c] = is_channel ? highest : 0;
      sums[2 * kChannels + c] = is_channel ? lowest : 0;
    }
  }
}

template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kThreads) add_up_chunks(const __grid_constant__ Arguments a, unsigned chunks) {
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  if (blockIdx.x < chunks) return add_up<T, kLanes, kAligned, false>(a, blockIdx.x);
  add_up<T, kLanes, kAligned, true>(a, blockIdx.x - chunks);
}

// A block of keys; some row sees [begin, end) of it.
struct Block : OfHead {
  int s;
  int first;
  int begin;
  int end;

  __device__ Block(const Arguments& a, unsigned index)
      : OfHead(index, a.problem.kv_heads, a.images.key_blocks[0] + a.images.key_blocks[1]) {
    s = item >= a.images.key_blocks[0] ? 1 : 0;
    first = a.images.shape.keys * (item - (s == 1 ? a.images.key_blocks[0] : 0));
    const int2 seen = seen_keys(a, s, batch);
    begin = max(first, seen.x);
    end = min(first + a.images.shape.keys, seen.y);
  }

  template <class T>
  __device__ const T* at(const void* data, const Strides& strides) const {
    return static_cast<const T*>(data) + batch * strides.batch + head * strides.head;
  }
};

// Adds up a channel's chunks, in order: K's and V's means and V's scale.
__device__ void add_chunks(const Arguments& a, std::size_t head_index, int c) {
  const SageImages& images = a.images;
  const int chunks = images.chunks[0] + images.chunks[1];
  const int channels = images.shape.channels;
  const float* key_sums = images.key_sums + head_index * chunks * channels + c;
  const float* value_sums = images.value_sums + head_index * chunks * 3 * channels + c;
  float key_sum = 0;
  float value_sum = 0;
  float high = -INFINITY;
  float low = INFINITY;
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) {
    key_sum += key_sums[i * channels];
    value_sum += value_sums[3 * i * channels];
    high = fmaxf(high, value_sums[(3 * i + 1) * channels]);
    low = fminf(low, value_sums[(3 * i + 2) * channels]);
  }
  int count = 0;
  for (int i = 0; i < chunks; ++i) count += images.key_counts[head_index * chunks + i];
  const float keys = static_cast<float>(max(count, 1));
  const float mean = a.quantization.smooth_value ? value_sum / keys : 0;
  float largest = fmaxf(high - mean, mean - low);
  if (high < low) largest = 0;                        // nothing is seen
  if (!(fabsf(value_sum) < INFINITY)) largest = NAN;  // which comparisons do not find
  images.key_mean[head_index * channels + c] = a.quantization.smooth_key ? key_sum / keys : 0;
  images.value_mean[head_index * channels + c] = mean;
  images.value_scale[head_index * channels + c] = scale_of(largest, kMostFp8);
}

template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kThreads, kLanes == 32 ? 4 : 6)
    quantize_queries(const __grid_constant__ Arguments a, unsigned heads) {
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  if (blockIdx.x >= heads) return quantize_query<T, kLanes, kAligned>(a, blockIdx.x - heads);
  for (int c = static_cast<int>(threadIdx.x); c < 8 * kLanes; c += kThreads) add_chunks(a, blockIdx.x, c);
}

template <class T, int kLanes, bool kAligned>
__device__ void quantize_key(const Arguments& a, const Block& block) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  constexpr int kChannels = 8 * kLanes;
  const KeySegment& segment = a.problem.key_segments[block.s];
  __shared__ int largest[kSageKeyGroups];  // floats that are not negative are ordered as their bits; NaN is the largest
  const Tokens tokens(block.at<T>(segment.key, segment.key_strides), segment.key_strides.token, block.first,
                      block.begin, block.end, static_cast<int>(a.problem.head_size));
  float mean[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) mean[c] = a.images.key_mean[block.head_index * kChannels + 8 * Tokens::lane() + c];
  const KeyMask mask(segment, block.batch);
  const int keys = a.images.shape.keys;
  if (mask.exists() && threadIdx.x < keys) {
    const int key = block.first + static_cast<int>(threadIdx.x);
    const std::uint32_t bits = __ballot_sync(kWarp, key < block.end && !mask.hides(key));
    if (threadIdx.x % 32 == 0) a.images.key_bits[block.place * (keys / 32) + threadIdx.x / 32] = bits;
  }
  if (threadIdx.x < kSageKeyGroups) largest[threadIdx.x] = 0;
  __syncthreads();
  const auto group_of = [&](int i) { return a.quantization.per_thread ? Tokens::token(i) % 8 / 2 : 0; };
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    float of_key = 0;
#pragma unroll
    for (int c = 0; c < 8; ++c) of_key = larger(of_key, widen(tokens.eights[i].x[c]) - mean[c]);
    of_key = largest_of_lanes<kLanes>(tokens.has_channels ? of_key : 0);
    const int key = block.first + Tokens::token(i);
    if (Tokens::lane() == 0 && key >= block.begin && key < block.end && !mask.hides(key)) {
      atomicMax(&largest[group_of(i)], __float_as_int(of_key));
    }
  }
  __syncthreads();
  std::int8_t* image = a.images.key + block.place * keys * kChannels;
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    const float inverse = inverse_of(__int_as_float(largest[group_of(i)]), kMostByte);
    *reinterpret_cast<uint2*>(image +
                              sage_place(keys, sage_row_bytes(kChannels), Tokens::token(i), 8 * Tokens::lane())) =
        to_bytes([&](int c) { return (widen(tokens.eights[i].x[c]) - mean[c]) * inverse; });
  }
  if (threadIdx.x < kSageKeyGroups) {
    a.images.key_scale[block.place * kSageKeyGroups + threadIdx.x] =
        scale_of(__int_as_float(largest[a.quantization.per_thread ? threadIdx.x : 0]), kMostByte);
  }
}

// Sixteen positions of a channel, as e4m3.
template <class Number>
__device__ uint4 to_e4m3(const Number& number) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const auto pair = [&](int at) {
      return static_cast<std::uint32_t>(
          __nv_cvt_float2_to_fp8x2(make_float2(number(at), number(at + 1)), __NV_SATFINITE, __NV_E4M3));
    };
    words[w] = pair(4 * w) | pair(4 * w + 2) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T, int kLanes, bool kAligned>
__device__ void quantize_value(const Arguments& a, const Block& block) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  struct alignas(4) Two {
    T x[2];
  };
  constexpr int kChannels = 8 * kLanes;
  extern __shared__ __align__(16) unsigned char memory[];
  const KeySegment& segment = a.problem.key_segments[block.s];
  {
    Tokens tokens(block.at<T>(segment.value, segment.value_strides), segment.value_strides.token, block.first,
                  block.begin, block.end, static_cast<int>(a.problem.head_size));
    auto* values = reinterpret_cast<Eight<T>*>(memory);             // [keys][kLanes]
    if (const KeyMask mask(segment, block.batch); mask.exists()) {  // what it hides may be anything, and 0 times it
#pragma unroll
      for (int i = 0; i < Tokens::kCount; ++i) {
        if (mask.hides(min(max(block.first + Tokens::token(i), block.begin), block.end - 1))) tokens.eights[i] = {};
      }
    }
#pragma unroll
    for (int i = 0; i < Tokens::kCount; ++i) values[Tokens::token(i) * kLanes + Tokens::lane()] = tokens.eights[i];
  }
  __syncthreads();
  // A thread has 16 positions of two neighbouring channels, a warp those of 64.
  const int head = a.images.shape.head;
  const int keys = a.images.shape.keys;
  std::uint8_t* image = a.images.value + block.place * head * keys;
  for (int i = static_cast<int>(threadIdx.x); i < head / 2 * (keys / 16); i += static_cast<int>(blockDim.x)) {
    const int piece = i / (head / 2);
    const int channel = i % (head / 2) * 2;
    const std::size_t of_head = block.head_index * kChannels + channel;
    const float2 mean = *reinterpret_cast<const float2*>(a.images.value_mean + of_head);
    const float2 scale = *reinterpret_cast<const float2*>(a.images.value_scale + of_head);
    const float2 inverse = make_float2(inverse_of(scale.x, 1), inverse_of(scale.y, 1));
    const auto* pairs =
        reinterpret_cast<const Two*>(memory) + (piece / 2 * 32 + piece % 2 * 16) * (kChannels / 2) + channel / 2;
    float x[2][16];
#pragma unroll
    for (int at = 0; at < 16; ++at) {
      const Two pair = pairs[sage_key_at(at) * (kChannels / 2)];
      x[0][at] = (widen(pair.x[0]) - mean.x) * inverse.x;
      x[1][at] = (widen(pair.x[1]) - mean.y) * inverse.y;
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      *reinterpret_cast<uint4*>(image + sage_place(head, kSagePanelKeys, channel + c, 16 * piece)) =
          to_e4m3([&](int at) { return x[c][at]; });
    }
  }
}

template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kMostThreads, kLanes == 32 ? 2 : 3)
    quantize_keys(const __grid_constant__ Arguments a, unsigned blocks) {
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  const bool is_key = blockIdx.x < blocks;
  const Block block(a, is_key ? blockIdx.x : blockIdx.x - blocks);
  if (block.begin >= block.end) return;  // no row looks at it
  if (is_key) return quantize_key<T, kLanes, kAligned>(a, block);
  quantize_value<T, kLanes, kAligned>(a, block);
}

// A row's product with K's mean, which smoothing takes off its logits: a warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads) offset_lse(const __grid_constant__ Arguments a) {
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  const AttentionProblem& p = a.problem;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t index = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= p.batch * p.heads * p.rows) return;
  const std::int64_t row = index % p.rows;
  const std::int64_t head = index / p.rows % p.heads;
  const std::int64_t batch = index / p.rows / p.heads;
  const int s = p.num_queries == 2 && row >= p.queries[1].first_row ? 1 : 0;
  const QuerySegment& segment = p.queries[s];
  const T* query = static_cast<const T*>(segment.data) + batch * segment.strides.batch +
                   (row - segment.first_row) * segment.strides.token + head * segment.strides.head;
  const float* mean =
      a.images.key_mean + (batch * p.kv_heads + head / (p.heads / p.kv_heads)) * a.images.shape.channels;
  float product = 0;
  for (int c = lane; c < p.head_size; c += 32) product = fmaf(widen(query[c]), mean[c], product);
  for (int distance = 16; distance > 0; distance /= 2) product += __shfl_xor_sync(kWarp, product, distance);
  if (lane == 0)
    p.lse[batch * p.lse_strides.batch + row * p.lse_strides.token + head * p.lse_strides.head] = product * p.scale;
}

}  // namespace
}  // namespace ditattn::kernels::cuda
