#pragma once

/// The kernels that quantize for SAGE_ATTN_3. Included by .cu files alone.

#include "kernels/cuda/sage3_formats_impl.hpp"
#include "kernels/cuda/sage3_tokens_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kAddingThreads = 256;

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
          const float value = counts ? x[n][i] : 0;
          sum[i] += value;
          largest[i] = fmaxf(largest[i], fabsf(value));
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
  const bool wants_offsets = p.lse != nullptr && a.smoothing.key;
#pragma unroll 4
  for (int i = 0; i < 8; ++i) {
    const int row = static_cast<int>(index % tiles * kSage3Keys + threadIdx.x / kLanes) + 16 * i;
    float x[8] = {};
    if (row < p.rows) {
      read_channels<T, kAligned>(query_tokens<T>(p, batch, in_batch, row).first, channel, static_cast<int>(p.head_size),
                                 x);
    }
    const bool finite = all_of_row<kLanes>(are_finite(x));
    float offset = 0;
    if (wants_offsets) {
#pragma unroll
      for (int c = 0; c < 8; ++c) offset = fmaf(x[c], channel < images.channels ? key_mean[c] : 0, offset);
      offset = sum_of_row<kLanes>(offset);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) x[c] -= channel < images.channels ? mean[c] : 0;
    const float scale = scale_of(largest_of_row<kLanes>(largest_of(x)));
    const std::size_t at = std::size_t{head} * p.rows + row;
    const Sage3Group group = group_of(x, scale);
    if (row < p.rows && channel < images.channels) {
      Format::store_row(images, images.query, images.query_groups, at, channel, group, x);
    }
    if (lane != 0 || row >= p.rows) continue;
    images.query_scale[at] = finite ? scale * (p.scale * kLog2E) : NAN;
    if (wants_offsets) {
      p.lse[batch * p.lse_strides.batch + row * p.lse_strides.token + in_batch * p.lse_strides.head] = offset * p.scale;
    }
  }
}

// A block of V: four channels of a group of 16 keys for each thread.
template <class Format, class T, int kLanes, bool kAligned>
__device__ void quantize_values(const Sage3Arguments& a, unsigned index) {
  const AttentionProblem& p = a.problem;
  const Sage3Images& images = a.images;
  const auto kv_heads = static_cast<unsigned>(p.kv_heads);
  const unsigned kv = index / images.blocks();
  const Sage3Block block(a, static_cast<int>(kv / kv_heads), static_cast<int>(kv % kv_heads),
                         static_cast<int>(index % images.blocks()));
  constexpr int kQuads = 2 * kLanes;
  const int channel = 4 * (static_cast<int>(threadIdx.x) % kQuads);
  const int key_group = static_cast<int>(threadIdx.x) / kQuads;
  const auto head_size = static_cast<int>(p.head_size);
  const float* means = mean_of(images, static_cast<std::size_t>(p.batch) * kv_heads + kv) + channel;
  float mean[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) mean[c] = channel < images.channels ? means[c] : 0;
  const auto tokens = block.tokens<T>(false);
  const bool whole = block.begin <= 0 && block.end >= kSage3Keys && !block.mask.exists();
  float x[kNvfp4Group][4];
  float largest = 0;
  float nothing = 0;  // NaN where some number is not finite
#pragma unroll
  for (int i = 0; i < kNvfp4Group; ++i) {
    const int key = key_group * kNvfp4Group + i;
#pragma unroll
    for (int c = 0; c < 4; ++c) x[i][c] = 0;
    if (!whole && !block.sees(key)) continue;
    const T* row = tokens.row(key);
    if constexpr (kAligned) {
      uint2 bits = make_uint2(0, 0);
      if (channel < head_size) bits = *reinterpret_cast<const uint2*>(row + channel);
      const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][c] = widen(elements[c]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) x[i][c] = channel + c < head_size ? widen(row[channel + c]) : 0;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x[i][c] -= mean[c];
      largest = fmaxf(largest, fabsf(x[i][c]));
      nothing = fmaf(x[i][c], 0, nothing);
    }
  }
  largest = largest_of_block(largest);
  const bool broken = __syncthreads_or(static_cast<int>(nothing != 0)) != 0;
  const float scale = scale_of(largest);
  if (channel < images.channels) Format::store_values(images, index, channel, key_group, scale, x);
  const auto group = static_cast<unsigned>(p.heads / p.kv_heads);
  for (unsigned g = threadIdx.x; g < group; g += blockDim.x) {
    const std::size_t head = std::size_t{kv} * group + g;
    // Rows that see something that is not finite are computed again, exactly.
    images.records[(head * images.blocks() + block.block) * kSage3Record + kSage3ValueScale] = broken       ? NAN
                                                                                               : scale == 0 ? 1
                                                                                                            : scale;
  }
}

// Blocks of K, blocks of V, tiles of Q.
template <class Format, class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(16 * kLanes, 32 / kLanes) quantize_all(const __grid_constant__ Sage3Arguments a) {
  const auto blocks = static_cast<unsigned>(a.problem.batch * a.problem.kv_heads * a.images.blocks());
  if (blockIdx.x < blocks) {
    quantize_keys<Format, T, kLanes, kAligned>(a, blockIdx.x);
  } else if (blockIdx.x < 2 * blocks) {
    quantize_values<Format, T, kLanes, kAligned>(a, blockIdx.x - blocks);
  } else {
    quantize_queries<Format, T, kLanes, kAligned>(a, blockIdx.x - 2 * blocks);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cuda
