#pragma once

/// The kernels that quantize. Included by the sage_quantize_*.cu alone.

#include "kernels/cuda/sage_sums_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

// 64 rows of Q.
template <class Way, class T, int kLanes, bool kAligned>
__device__ void quantize_query(const Arguments& a, unsigned index) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  constexpr int kChannels = 8 * kLanes;
  const AttentionProblem& p = a.problem;
  const int tiles = a.images.query_tiles[0] + a.images.query_tiles[1];
  // Heads are the fastest, as tokens lie in memory, where neighbours are read together.
  const auto heads = static_cast<unsigned>(p.heads);
  const unsigned row_of_heads = index / heads;
  const int batch = static_cast<int>(row_of_heads / tiles);
  if (batch >= p.batch) return;
  const int head = static_cast<int>(index % heads);
  const int tile = static_cast<int>(row_of_heads % tiles);
  const std::size_t place = (static_cast<std::size_t>(batch) * p.heads + head) * tiles + tile;
  const int s = tile >= a.images.query_tiles[0] ? 1 : 0;
  const int first_row = kSageQueryRows * (tile - (s == 1 ? a.images.query_tiles[0] : 0));
  const QuerySegment& segment = p.queries[s];
  const T* data = static_cast<const T*>(segment.data) + batch * segment.strides.batch + head * segment.strides.head;
  const int group = static_cast<int>(threadIdx.x) / kThreads;  // tokens are counted from the first of the block
  const Tokens tokens(data, segment.strides.token, first_row - kSageQueryRows * group, 0,
                      static_cast<int>(rows_of(p, s)), static_cast<int>(p.head_size));
  // One of the threads that have a row finds its scale for all.
  std::uint32_t size = 0;
  std::uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    const std::uint32_t of_row = largest_of_lanes<kLanes>(tokens.has_channels ? sizes_of(tokens.eights[i]) : 0);
    if (Tokens::lane() == i) size = of_row;
    most = __vmaxu2(most, of_row);
  }
  if (!a.quantization.per_thread) size = largest_of_lanes<32>(most);
  const float largest = to_number<T>(size);
  const bool is_fp8 = Way::is_fp8(a);
  const float inverse = copysignf(inverse_of(largest, most_of(is_fp8)), p.scale);
  if (Tokens::lane() < Tokens::kCount) {
    a.images.query_scale[place * kSageQueryRows + Tokens::token(Tokens::lane()) % kSageQueryRows] =
        scale_of(largest, most_of(is_fp8)) * fabsf(p.scale) * kLog2E;
  }
  std::int8_t* image = a.images.query + place * kSageQueryRows * kChannels;
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    const float of_row = __shfl_sync(kWarp, inverse, i, kLanes);
    const float factor = tokens.has_channels ? of_row : 0;
    const int row = Tokens::token(i) % kSageQueryRows;
    *reinterpret_cast<uint2*>(image + sage_place(kSageQueryRows, sage_row_bytes(kChannels), row, 8 * Tokens::lane())) =
        to_eight(is_fp8, factor, [&](int c) { return widen(tokens.eights[i].x[c]); });
  }
}

// A rank's K.
template <class Way, class T, int kLanes, int kKeys, bool kAligned>
__device__ void quantize_key(const Arguments& a, const Part& part, bool is_first, unsigned char* memory) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  constexpr int kChannels = 8 * kLanes;
  __shared__ float means[kChannels];
  // Floats that are not negative are ordered as their bits, NaN above all. Three in turn: one is zeroed while the one
  // before may still be read.
  __shared__ int largest_of[3][2][kSageKeyGroups];
  if (threadIdx.x < sizeof(largest_of) / sizeof(int)) largest_of[0][0][threadIdx.x] = 0;
  Way::template find<T, kLanes, kKeys, kAligned, true>(
      a, part, memory, [&](unsigned c, const SageTotal& total, float keys) {
        means[c] = a.quantization.smooth_key ? total.sum / keys : 0;
        if (is_first) a.images.key_mean[part.head_index * kChannels + c] = means[c];
      });
  float mean[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) mean[c] = means[8 * Tokens::lane() + c];
  // Every kSlots-th of a thread's tokens, or pairs of them, are of the same group.
  constexpr int kSlots = kLanes == 8 ? 2 : kSageKeyGroups;
  const auto slot_of = [](int i) { return kLanes == 32 ? i % 8 / 2 : i % kSlots; };
  const int offset = kLanes == 8 ? static_cast<int>(threadIdx.x % 32) / 16 : 0;
  const auto group_of = [&](int slot) {
    return a.quantization.per_thread ? slot * (kSageKeyGroups / kSlots) + offset : 0;
  };
  const bool is_fp8 = Way::is_fp8(a);
  const int thread = Block<kKeys>::thread();
  int turn = 0;
  for (int item = part.first; item < part.last; item += Block<kKeys>::at_once()) {
    const Block<kKeys> block(a, part, item, part.last);  // what no row sees stays as it is
    int* largest = largest_of[turn][Block<kKeys>::index()];
    turn = turn == 2 ? 0 : turn + 1;
    if (thread < kSageKeyGroups) largest_of[turn][Block<kKeys>::index()][thread] = 0;
    Tokens tokens;
    if (block.is_seen) {
      tokens = read_block<Tokens, true>(a, block);
      const KeyMask mask(*block.segment, block.batch);
      if (mask.exists() && thread < kKeys) {
        const int key = block.first + thread;
        const std::uint32_t bits = __ballot_sync(kWarp, key < block.end && !mask.hides(key));
        if (thread % 32 == 0) a.images.key_bits[block.place * (kKeys / 32) + thread / 32] = bits;
      }
      float most[kSlots] = {};
#pragma unroll
      for (int i = 0; i < Tokens::kCount; ++i) {
        float of_key = 0;
#pragma unroll
        for (int c = 0; c < 8; ++c) of_key = larger(of_key, widen(tokens.eights[i].x[c]) - mean[c]);
        if (!block.is_whole) {
          const int key = block.key(Tokens::token(i));
          if (!block.sees(key) || mask.hides(key)) of_key = 0;
        }
        most[slot_of(i)] = larger(most[slot_of(i)], of_key);
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float of_warp = largest_of_lanes<kLanes>(tokens.has_channels ? most[slot] : 0);
        if (Tokens::lane() == 0) atomicMax(&largest[group_of(slot)], __float_as_int(of_warp));
      }
    }
    __syncthreads();
    if (!block.is_seen) continue;
    tokens.stay_narrow();
    // One of four threads finds a group's scale for all.
    const int group = thread % kSageKeyGroups;
    const float largest_of_group = __int_as_float(largest[a.quantization.per_thread ? group : 0]);
    const float inverse = inverse_of(largest_of_group, most_of(is_fp8));
    if (thread < kSageKeyGroups) {
      a.images.key_scale[block.place * kSageKeyGroups + group] = scale_of(largest_of_group, most_of(is_fp8));
    }
    float inverses[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) inverses[slot] = __shfl_sync(kWarp, inverse, group_of(slot));
    std::int8_t* image = a.images.key + block.place * kKeys * kChannels;
#pragma unroll
    for (int i = 0; i < Tokens::kCount; ++i) {
      const int row = Tokens::token(i) % kKeys;
      *reinterpret_cast<uint2*>(image + sage_place(kKeys, sage_row_bytes(kChannels), row, 8 * Tokens::lane())) =
          to_eight(is_fp8, inverses[slot_of(i)], [&](int c) { return widen(tokens.eights[i].x[c]) - mean[c]; });
    }
  }
}

// A block of V in float16.
template <class T, int kLanes, int kKeys, class Tokens>
__device__ void store_wide(const Arguments& a, std::size_t place, const Tokens& tokens, const float4* of_pairs) {
  const int head = a.images.shape.head;
  if (8 * Tokens::lane() >= head) return;
  std::uint8_t* image = a.images.value + place * head * kKeys * sizeof(__half);
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    Eight<__half> eight;
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      const float4 of_pair = of_pairs[4 * Tokens::lane() + c / 2];
      eight.x[c] = __float2half_rn(fmaf(widen(tokens.eights[i].x[c]), of_pair.x, of_pair.z));
      eight.x[c + 1] = __float2half_rn(fmaf(widen(tokens.eights[i].x[c + 1]), of_pair.y, of_pair.w));
    }
    const int key = Tokens::token(i) % kKeys;
    *reinterpret_cast<Eight<__half>*>(image + sage_place(kKeys, kSageWidePanelBytes, key, 16 * Tokens::lane())) = eight;
  }
}

// A rank's V.
template <class Way, class T, int kLanes, int kKeys, bool kAligned>
__device__ void quantize_value(const Arguments& a, const Part& part, bool is_first, unsigned char* memory) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  struct alignas(4) Two {
    T x[2];
  };
  constexpr int kChannels = 8 * kLanes;
  __shared__ float4 of_pairs[kChannels / 2];  // (x − mean) / scale = x · (x, y) + (z, w)
  Way::template find<T, kLanes, kKeys, kAligned, false>(
      a, part, memory, [&](unsigned c, const SageTotal& total, float keys) {
        float mean = a.quantization.smooth_value ? total.sum / keys : 0;
        if (fabsf(mean) * kSageLeastMean < fmaxf(total.high, -total.low)) mean = 0;
        float largest = fmaxf(total.high - mean, mean - total.low);
        if (!(fabsf(total.sum) < INFINITY)) largest = NAN;  // which comparisons do not find
        const float scale = scale_of(largest, kMostFp8);
        const float inverse = inverse_of(scale, 1);
        auto* of_pair = reinterpret_cast<float*>(&of_pairs[c / 2]);
        of_pair[c % 2] = inverse;
        of_pair[2 + c % 2] = -mean * inverse;
        if (!is_first) return;
        a.images.value_mean[part.head_index * kChannels + c] = mean;
        a.images.value_scale[part.head_index * kChannels + c] = scale;
      });
  const int head = a.images.shape.head;
  const int thread = Block<kKeys>::thread();
  const auto* pairs_of_block = reinterpret_cast<const Two*>(memory) + Block<kKeys>::index() * kKeys * (kChannels / 2);
  auto* values = reinterpret_cast<Eight<T>*>(memory);  // [blocks, keys][kLanes]
  for (int item = part.first; item < part.last; item += Block<kKeys>::at_once()) {
    const Block<kKeys> block(a, part, item, part.last);
    Tokens tokens;
    if (block.is_seen) {
      tokens = read_block<Tokens, false>(a, block);
      if (const KeyMask mask(*block.segment, block.batch); mask.exists()) {
        // What it hides may be anything, and 0 times it.
#pragma unroll
        for (int i = 0; i < Tokens::kCount; ++i) {
          if (mask.hides(min(max(block.key(Tokens::token(i)), block.begin), block.end - 1))) {
            reinterpret_cast<uint4&>(tokens.eights[i]) = {};
          }
        }
      }
    }
    if constexpr (!Way::kSharesSums) {
      if (a.images.shape.wide_values) {
        if (block.is_seen) store_wide<T, kLanes, kKeys>(a, block.place, tokens, of_pairs);
        continue;
      }
    }
    __syncthreads();  // the block before is read
    if (block.is_seen) {
#pragma unroll
      for (int i = 0; i < Tokens::kCount; ++i) values[Tokens::token(i) * kLanes + Tokens::lane()] = tokens.eights[i];
    }
    __syncthreads();
    if (!block.is_seen) continue;
    // A thread has 16 positions of two neighbouring channels, a warp those of 64.
    std::uint8_t* image = a.images.value + block.place * head * kKeys;
#pragma unroll 1
    for (int i = thread; i < head / 2 * (kKeys / 16); i += Block<kKeys>::kThreads) {
      const int piece = i / (head / 2);
      const int pair = i % (head / 2);
      const float4 of_pair = of_pairs[pair];
      const Two* pairs = pairs_of_block + (piece / 2 * 32 + piece % 2 * 16) * (kChannels / 2) + pair;
      float x[2][16];
#pragma unroll
      for (int at = 0; at < 16; ++at) {
        const Two two = pairs[sage_key_at(at) * (kChannels / 2)];
        x[0][at] = fmaf(widen(two.x[0]), of_pair.x, of_pair.z);
        x[1][at] = fmaf(widen(two.x[1]), of_pair.y, of_pair.w);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const auto word = [&](int at) { return to_e4m3_word([&](int i) { return x[c][i]; }, at); };
        *reinterpret_cast<uint4*>(image + sage_place(head, kSagePanelKeys, 2 * pair + c, 16 * piece)) =
            make_uint4(word(0), word(4), word(8), word(12));
      }
    }
  }
}

// Blocks that have Q come last: they fill what clusters, which wait for each other, leave.
template <class Way, class T, int kLanes, int kKeys, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads<kLanes>, (kBlocksAtOnce<kLanes, kKeys>))
    quantize_all(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) unsigned char memory[];
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  const unsigned cluster = blockIdx.x / a.ranks;
  const unsigned rank = blockIdx.x % a.ranks;
  if (cluster >= 2 * a.heads) {
    const unsigned index = blockIdx.x - 2 * a.heads * a.ranks;
    constexpr int kTiles = kBlockThreads<kLanes> / kThreads;
    return quantize_query<Way, T, kLanes, kAligned>(a, index * kTiles + threadIdx.x / kThreads);
  }
  const bool is_key = cluster < a.heads;
  const Part part(a, is_key ? cluster : cluster - a.heads, rank);
  if (is_key) {
    quantize_key<Way, T, kLanes, kKeys, kAligned>(a, part, rank == 0, memory);
  } else {
    quantize_value<Way, T, kLanes, kKeys, kAligned>(a, part, rank == 0, memory);
  }
  Way::end();
}

// For kernels that find sums in memory: a block of threads a stretch.
template <class T, int kLanes, int kKeys, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads<kLanes>, (kBlocksAtOnce<kLanes, kKeys>))
    add_up_all(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) unsigned char memory[];
  const unsigned head = blockIdx.x / a.stretches;
  const bool is_key = head < a.heads;
  const Part part(a, is_key ? head : head - a.heads, blockIdx.x % a.stretches);
  if (is_key) {
    InTwoLaunches::leave<T, kLanes, kKeys, kAligned, true>(a, part, memory);
  } else {
    InTwoLaunches::leave<T, kLanes, kKeys, kAligned, false>(a, part, memory);
  }
}

// A row's product with K's mean, which smoothing takes off its logits: a warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads) offset_lse(const __grid_constant__ Arguments a) {
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  const AttentionProblem& p = a.problem;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t index = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
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
