#pragma once

/// The kernels that quantize for SAGE_ATTN_3. Included by .cu
/// files alone.

#include "kernels/cuda/flash_rows_impl.hpp"
#include "kernels/cuda/nvfp4_impl.hpp"
#include "kernels/cuda/sage3_images.hpp"
#include "kernels/cuda/seen_keys_impl.hpp"
#include "kernels/sage3_fp4_layout.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kAddingThreads = 256;

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

// --- Means ---

// A stretch of one source's tokens: rows of Q, or keys of blocks.
template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kAddingThreads) add_up(const __grid_constant__ Sage3Arguments a) {
  constexpr int kChannels = 8 * kLanes;
  constexpr int kWarps = kAddingThreads / 32;
  constexpr int kRowsAtOnce = kAddingThreads / kLanes;
  const AttentionProblem& p = a.problem;
  const unsigned stretch = blockIdx.x % a.images.stretches;
  const Source source(p, blockIdx.x / a.images.stretches);
  const bool wanted = source.part == Part::query ? a.smoothing.query
                      : source.part == Part::key ? a.smoothing.key
                                                 : a.smoothing.value;
  const bool is_query = source.part == Part::query;
  const auto parts = static_cast<int>(is_query ? (p.rows + kSage3Keys - 1) / kSage3Keys : a.images.blocks());
  const int first = parts * static_cast<int>(stretch) / a.images.stretches;
  const int last = wanted ? parts * static_cast<int>(stretch + 1) / a.images.stretches : first;
  const auto head_size = static_cast<int>(p.head_size);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int own_row = static_cast<int>(threadIdx.x) / kLanes;
  float sum[8] = {};
  float largest[8] = {};
  int rows = 0;
  // Rows of up to 128 tokens, some of them read at a time.
  const auto add = [&](const Tokens<T>& tokens, const auto& exists) {
    constexpr int kInFlight = 4;
#pragma unroll 1
    for (int begin = 0; begin < kSage3Keys; begin += kInFlight * kRowsAtOnce) {
      float x[kInFlight][8];
      bool reads[kInFlight];
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const int token = begin + n * kRowsAtOnce + own_row;
        reads[n] = token < kSage3Keys && exists(token);
#pragma unroll
        for (int c = 0; c < 8; ++c) x[n][c] = 0;
        if (reads[n]) read_channels<T, kAligned>(tokens.row(token), 8 * lane, head_size, x[n]);
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const bool counts = all_of_row<kLanes>(reads[n] && are_finite(x[n]));
        rows += counts ? 1 : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sum[i] += counts ? x[n][i] : 0;
          largest[i] = fmaxf(largest[i], counts ? fabsf(x[n][i]) : 0);
        }
      }
    }
  };
  for (int part = first; part < last; ++part) {
    if (is_query) {
      const int row = part * kSage3Keys;
      const int second = p.num_queries == 2 ? static_cast<int>(p.queries[1].first_row) : 0;
      const int end = min(kSage3Keys, static_cast<int>(p.rows) - row);
      const int split = row < second ? min(end, second - row) : end;  // those of the segment that it begins in
      add(query_tokens<T>(p, source.batch, source.head, row), [&](int token) { return token < split; });
      if (split == end) continue;
      Tokens<T> tokens = query_tokens<T>(p, source.batch, source.head, second);
      tokens.first -= split * tokens.stride;
      add(tokens, [&](int token) { return token >= split && token < end; });
    } else {
      const Sage3Block block(a, source.batch, source.head, part);
      add(block.tokens<T>(source.part == Part::key), [&](int token) { return block.sees(token); });
    }
  }
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) {
    rows += __shfl_xor_sync(kWarp, rows, distance);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i] += __shfl_xor_sync(kWarp, sum[i], distance);
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(kWarp, largest[i], distance));
    }
  }
  __shared__ Sage3Total of_warps[kWarps][kChannels];
  __shared__ int rows_of_warps[kWarps];
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) of_warps[warp][8 * lane + i] = {sum[i], largest[i]};
  }
  if (threadIdx.x % 32 == 0) rows_of_warps[warp] = rows;
  __syncthreads();
  const std::size_t at = source.index * a.images.stretches + stretch;
  for (int c = static_cast<int>(threadIdx.x); c < a.images.channels; c += kAddingThreads) {
    Sage3Total total{0, 0};
    for (int w = 0; w < kWarps; ++w) {
      total.sum += of_warps[w][c].sum;
      total.largest = fmaxf(total.largest, of_warps[w][c].largest);
    }
    a.images.totals[at * a.images.channels + c] = total;
  }
  if (threadIdx.x != 0) return;
  int all = 0;
  for (const int of_warp : rows_of_warps) all += of_warp;
  a.images.total_tokens[at] = all;
}

// One source's means.
__global__ void find_means(const __grid_constant__ Sage3Arguments a) {
  const Source source(a.problem, blockIdx.x);
  const std::size_t first = source.index * a.images.stretches;
  int tokens = 0;
  for (int i = 0; i < a.images.stretches; ++i) tokens += a.images.total_tokens[first + i];
  const bool all = source.part == Part::key;
  for (int c = static_cast<int>(threadIdx.x); c < a.images.channels; c += static_cast<int>(blockDim.x)) {
    Sage3Total total{0, 0};
    for (int i = 0; i < a.images.stretches; ++i) {
      const Sage3Total& part = a.images.totals[(first + i) * a.images.channels + c];
      total.sum += part.sum;
      total.largest = fmaxf(total.largest, part.largest);
    }
    const float mean = tokens > (all ? 0 : kSage3LeastMean) ? total.sum / static_cast<float>(tokens) : 0;
    const bool counts = all || fabsf(mean) * kSage3LeastMean >= total.largest;
    a.images.means[source.index * a.images.channels + c] = counts ? mean : 0;
  }
}

// --- Numbers ---

__device__ __forceinline__ float scale_of(float largest) {
  return largest > kSage3LeastNumber ? largest / kSage3ProbabilityMost : 0;
}

// A group's scale, and its numbers: nvfp4_number's results, in fewer steps, for what is finite.
struct Sage3Group {
  float scale;
  float inverse;

  __device__ __forceinline__ Sage3Group(float largest, float tensor_scale)
      : scale(tensor_scale == 0 ? 0 : round_to_e4m3(fminf(largest / E2m1::kMost / tensor_scale, E4m3::kMost))),
        inverse(scale == 0 ? 0 : 1 / (scale * tensor_scale)) {}
  __device__ __forceinline__ float number(float x) const {
    const float y = x * inverse;
    return copysignf(fminf(round_to_e2m1(fabsf(y)), E2m1::kMost), y);
  }
};

// How images hold numbers: as 16-bit floats, times their groups' scales.
template <class T>
struct Emulated {
  __device__ static int column_of(int key) { return sage3_column_of(key); }
  __device__ static int correction_at(int key) { return sage3_correction_at(key); }

  // Eight channels of a row.
  __device__ __forceinline__ static void store_row(const Sage3Images& images, void* image, std::uint8_t*,
                                                   std::size_t row, int channel, const Sage3Group& group,
                                                   const float (&x)[8]) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pack(group.number(x[2 * i]) * group.scale, group.number(x[2 * i + 1]) * group.scale, T{});
    }
    *reinterpret_cast<uint4*>(static_cast<T*>(image) + row * images.channels + channel) =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }

  // Two channels of V in a group of a block's keys.
  __device__ __forceinline__ static void store_values(const Sage3Images& images, std::size_t block, int channel,
                                                      int key_group, const Sage3Group (&groups)[2],
                                                      const float (&x)[kNvfp4Group][2]) {
    T* at = static_cast<T*>(images.value) +
            (block * kSage3Keys + sage3_column_of(key_group * kNvfp4Group)) * images.channels + channel;
#pragma unroll
    for (int i = 0; i < kNvfp4Group; ++i) {
      *reinterpret_cast<std::uint32_t*>(at + sage3_column_of(i) * images.channels) =
          pack(groups[0].number(x[i][0]) * groups[0].scale, groups[1].number(x[i][1]) * groups[1].scale, T{});
    }
  }
};

// As codes of e2m1 and e4m3, for products of NVFP4.
struct Packed {
  __device__ static int column_of(int key) { return fp4::column_of(key); }
  __device__ static int correction_at(int key) { return key; }

  // Of numbers that the formats have: above its least number with a leading 1, a code is a float's first bits.
  __device__ __forceinline__ static std::uint32_t e2m1_code(float x) {
    const float size = fabsf(x);
    const std::uint32_t code =
        size < 1 ? static_cast<std::uint32_t>(2 * size) : (__float_as_uint(size) >> 22) - 2 * 126;
    return code | (__float_as_uint(x) >> 31) << 3;
  }
  __device__ __forceinline__ static std::uint8_t e4m3_code(float x) {
    return static_cast<std::uint8_t>(x < 1.F / 64 ? static_cast<std::uint32_t>(512 * x)
                                                  : (__float_as_uint(x) >> 20) - 8 * 120);
  }

  __device__ __forceinline__ static void store_row(const Sage3Images& images, void* image, std::uint8_t* scales,
                                                   std::size_t row, int channel, const Sage3Group& group,
                                                   const float (&x)[8]) {
    std::uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) codes |= e2m1_code(group.number(x[i])) << 4 * i;
    *reinterpret_cast<std::uint32_t*>(static_cast<std::uint8_t*>(image) + (row * images.channels + channel) / 2) =
        codes;
    if (channel % kNvfp4Group == 0) scales[(row * images.channels + channel) / kNvfp4Group] = e4m3_code(group.scale);
  }

  __device__ __forceinline__ static void store_values(const Sage3Images& images, std::size_t block, int channel,
                                                      int key_group, const Sage3Group (&groups)[2],
                                                      const float (&x)[kNvfp4Group][2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::size_t row = block * images.channels + channel + c;
      std::uint32_t codes[2] = {};
#pragma unroll
      for (int i = 0; i < kNvfp4Group; ++i) codes[i / 8] |= e2m1_code(groups[c].number(x[i][c])) << 4 * (i % 8);
      *reinterpret_cast<uint2*>(static_cast<std::uint8_t*>(images.value) + row * (kSage3Keys / 2) + key_group * 8) =
          make_uint2(codes[0], codes[1]);
      images.value_groups[row * (kSage3Keys / kNvfp4Group) + key_group] = e4m3_code(groups[c].scale);
    }
  }
};

// The largest of a block of threads.
__device__ __forceinline__ float largest_of_block(float x) {
  __shared__ float of_warps[16];
  x = largest_of_row<32>(x);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / 32; ++w) x = fmaxf(x, of_warps[w]);
  return x;
}

// The group of eight channels of a row, of which two threads have them.
__device__ __forceinline__ Sage3Group group_of(const float (&x)[8], float scale) {
  const float largest = largest_of(x);
  return {fmaxf(largest, __shfl_xor_sync(kWarp, largest, 1)), scale};
}

// A block of K: eight of its rows for each thread, 16 rows at a time.
template <class Format, class T, int kLanes, bool kAligned>
__device__ void quantize_keys(const Sage3Arguments& a, unsigned index) {
  const AttentionProblem& p = a.problem;
  const Sage3Images& images = a.images;
  const auto kv_heads = static_cast<unsigned>(p.kv_heads);
  const unsigned kv = index / images.blocks();
  const Sage3Block block(a, static_cast<int>(kv / kv_heads), static_cast<int>(kv % kv_heads),
                         static_cast<int>(index % images.blocks()));
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int channel = 8 * lane;
  const int first = static_cast<int>(threadIdx.x) / kLanes;
  const float* mean = mean_of(images, kv) + channel;
  const auto tokens = block.tokens<T>(true);
  float x[8][8];
  bool broken[8];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool sees = block.sees(first + 16 * i);
#pragma unroll
    for (int c = 0; c < 8; ++c) x[i][c] = 0;
    if (sees) {
      read_channels<T, kAligned>(tokens.row(first + 16 * i), channel, static_cast<int>(p.head_size), x[i]);
    }
    broken[i] = !all_of_row<kLanes>(are_finite(x[i]));
#pragma unroll
    for (int c = 0; c < 8; ++c) x[i][c] = sees && !broken[i] && channel < images.channels ? x[i][c] - mean[c] : 0;
    largest = fmaxf(largest, largest_of(x[i]));
  }
  const float scale = scale_of(largest_of_block(largest));
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Sage3Group group = group_of(x[i], scale);
    if (channel >= images.channels) continue;
    const std::size_t row = std::size_t{index} * kSage3Keys + Format::column_of(first + 16 * i);
    Format::store_row(images, images.key, images.key_groups, row, channel, group, x[i]);
  }
  const auto group = static_cast<unsigned>(p.heads / p.kv_heads);
  for (unsigned g = 0; g < group; ++g) {
    const std::size_t head = std::size_t{kv} * group + g;  // of batch · heads
    float* record = images.records + (head * images.blocks() + block.block) * kSage3Record;
    float query_mean[8] = {};
    const float* means = mean_of(images, 2 * static_cast<std::size_t>(p.batch) * kv_heads + head) + channel;
#pragma unroll
    for (int c = 0; c < 8; ++c) query_mean[c] = channel < images.channels ? means[c] : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float product = 0;
#pragma unroll
      for (int c = 0; c < 8; ++c) product = fmaf(query_mean[c], x[i][c], product);
      product = sum_of_row<kLanes>(product) * (p.scale * kLog2E);
      if (lane == 0) record[Format::correction_at(first + 16 * i)] = broken[i] ? NAN : product;
    }
    if (threadIdx.x == 0) record[kSage3KeyScale] = scale;
    if (threadIdx.x < 2) record[kSage3ValueScale + 1 + threadIdx.x] = 0;  // whole pieces of 16 bytes are copied
  }
  if (images.key_bits == nullptr || !block.mask.exists() || block.head != 0 || threadIdx.x >= kSage3Keys) return;
  const bool seen = block.sees(static_cast<int>(threadIdx.x));
  const std::uint32_t bits = __ballot_sync(kWarp, seen);
  if (threadIdx.x % 32 == 0) {
    images.key_bits[(std::size_t(block.batch) * images.blocks() + block.block) * (kSage3Keys / 32) + threadIdx.x / 32] =
        bits;
  }
}

// 128 rows of a query head.
template <class Format, class T, int kLanes, bool kAligned>
__device__ void quantize_queries(const Sage3Arguments& a, unsigned index) {
  const AttentionProblem& p = a.problem;
  const Sage3Images& images = a.images;
  const auto tiles = static_cast<unsigned>((p.rows + kSage3Keys - 1) / kSage3Keys);
  const unsigned head = index / tiles;  // of batch · heads
  const int batch = static_cast<int>(head / p.heads);
  const int in_batch = static_cast<int>(head % p.heads);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int channel = 8 * lane;
  const auto of_keys = static_cast<std::size_t>(p.batch * p.kv_heads);
  const float* mean = mean_of(images, 2 * of_keys + head) + channel;
  const float* key_mean = mean_of(images, static_cast<std::size_t>(head / (p.heads / p.kv_heads))) + channel;
#pragma unroll 4
  for (int i = 0; i < 8; ++i) {
    const int row = static_cast<int>(index % tiles * kSage3Keys + threadIdx.x / kLanes) + 16 * i;
    float x[8] = {};
    if (row < p.rows) {
      read_channels<T, kAligned>(query_tokens<T>(p, batch, in_batch, row).first, channel, static_cast<int>(p.head_size),
                                 x);
    }
    float offset = 0;
    float nothing = 0;  // NaN where the row is not finite
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (channel >= images.channels) continue;
      nothing = fmaf(x[c], 0, nothing);
      offset = fmaf(x[c], key_mean[c], offset);
      x[c] -= mean[c];
    }
    nothing = sum_of_row<kLanes>(nothing);
    offset = sum_of_row<kLanes>(offset);
    const float scale = scale_of(largest_of_row<kLanes>(largest_of(x)));
    const std::size_t at = std::size_t{head} * p.rows + row;
    const Sage3Group group = group_of(x, scale);
    if (row < p.rows && channel < images.channels) {
      Format::store_row(images, images.query, images.query_groups, at, channel, group, x);
    }
    if (lane != 0 || row >= p.rows) continue;
    images.query_scale[at] = fmaf(scale, p.scale * kLog2E, nothing);
    if (p.lse != nullptr && a.smoothing.key) {
      p.lse[batch * p.lse_strides.batch + row * p.lse_strides.token + in_batch * p.lse_strides.head] = offset * p.scale;
    }
  }
}

// Blocks of K, then tiles of Q.
template <class Format, class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(16 * kLanes, 32 / kLanes) quantize_rows(const __grid_constant__ Sage3Arguments a) {
  const auto blocks = static_cast<unsigned>(a.problem.batch * a.problem.kv_heads * a.images.blocks());
  if (blockIdx.x < blocks) {
    quantize_keys<Format, T, kLanes, kAligned>(a, blockIdx.x);
  } else {
    quantize_queries<Format, T, kLanes, kAligned>(a, blockIdx.x - blocks);
  }
}

// A block of V: two channels of two groups of 16 keys for each thread.
template <class Format, class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(16 * kLanes, 32 / kLanes) quantize_values(const __grid_constant__ Sage3Arguments a) {
  const AttentionProblem& p = a.problem;
  const Sage3Images& images = a.images;
  const auto kv_heads = static_cast<unsigned>(p.kv_heads);
  const unsigned kv = blockIdx.x / images.blocks();
  const Sage3Block block(a, static_cast<int>(kv / kv_heads), static_cast<int>(kv % kv_heads),
                         static_cast<int>(blockIdx.x % images.blocks()));
  constexpr int kPairs = 4 * kLanes;
  const int channel = 2 * (static_cast<int>(threadIdx.x) % kPairs);
  const int first_group = static_cast<int>(threadIdx.x) / kPairs;
  const auto head_size = static_cast<int>(p.head_size);
  const float* means = mean_of(images, static_cast<std::size_t>(p.batch) * kv_heads + kv) + channel;
  float mean[2] = {};
  if (channel < images.channels) mean[0] = means[0], mean[1] = means[1];
  const auto tokens = block.tokens<T>(false);
  const bool whole = block.begin <= 0 && block.end >= kSage3Keys && !block.mask.exists();
  float x[2][kNvfp4Group][2];
  float largest = 0;
  float nothing = 0;  // NaN where some number is not finite
#pragma unroll
  for (int g = 0; g < 2; ++g) {
#pragma unroll
    for (int i = 0; i < kNvfp4Group; ++i) {
      const int key = (first_group + 4 * g) * kNvfp4Group + i;
      x[g][i][0] = x[g][i][1] = 0;
      if (!whole && !block.sees(key)) continue;
      const T* row = tokens.row(key);
      if constexpr (kAligned) {
        std::uint32_t bits = 0;
        if (channel < head_size) bits = *reinterpret_cast<const std::uint32_t*>(row + channel);
        const T* pair = reinterpret_cast<const T*>(&bits);
        x[g][i][0] = widen(pair[0]);
        x[g][i][1] = widen(pair[1]);
      } else {
#pragma unroll
        for (int c = 0; c < 2; ++c) x[g][i][c] = channel + c < head_size ? widen(row[channel + c]) : 0;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        x[g][i][c] -= mean[c];
        largest = fmaxf(largest, fabsf(x[g][i][c]));
        nothing = fmaf(x[g][i][c], 0, nothing);
      }
    }
  }
  largest = largest_of_block(largest);
  const bool broken = __syncthreads_or(static_cast<int>(nothing != 0)) != 0;
  const float scale = scale_of(largest);
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    float most[2] = {};
#pragma unroll
    for (int i = 0; i < kNvfp4Group; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) most[c] = fmaxf(most[c], fabsf(x[g][i][c]));
    }
    const Sage3Group groups[2] = {{most[0], scale}, {most[1], scale}};
    if (channel < images.channels) {
      Format::store_values(images, blockIdx.x, channel, first_group + 4 * g, groups, x[g]);
    }
  }
  const auto group = static_cast<unsigned>(p.heads / p.kv_heads);
  for (unsigned g = threadIdx.x; g < group; g += blockDim.x) {
    const std::size_t head = std::size_t{kv} * group + g;
    // Rows that see something that is not finite are computed again, exactly.
    images.records[(head * images.blocks() + block.block) * kSage3Record + kSage3ValueScale] = broken       ? NAN
                                                                                               : scale == 0 ? 1
                                                                                                            : scale;
  }
}

}  // namespace
}  // namespace ditattn::kernels::cuda
