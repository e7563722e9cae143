#pragma once

/// The kernels of sage_quantize.cu, which alone includes this.

#include <type_traits>

#include "kernels/cuda/hopper_impl.hpp"
#include "kernels/cuda/sage_numbers_impl.hpp"
#include "kernels/cuda/sage_quantize.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kThreads = 128;  // of a tile of Q
// Of a block of threads: each has eight pieces of Q, K or V in registers, or 16.
template <int kLanes>
constexpr int kBlockThreads = kLanes == 32 ? 128 : 256;

constexpr int kMostStretches = 2;  // of a rank

// How many blocks of threads a multiprocessor has at a time, as measured to be best: of registers against how much is
// under way.
template <int kLanes, int kKeys>
constexpr int kBlocksAtOnce = kLanes == 8 ? 4 : kLanes == 16 && kKeys == 64 ? 2 : 3;

struct Arguments {
  AttentionProblem problem;
  SageQuantization quantization;
  SageImages images;
  unsigned heads;  // of K, then as many of V; the blocks after theirs have Q
  unsigned stretches;  // of keys, whose sums are added up in order: by the lengths alone
  unsigned ranks;      // blocks of threads that have K or V of a head together, one stretch or two each
};

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

// 64 rows of Q.
template <class T, int kLanes, bool kAligned>
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
  const T* data =
      static_cast<const T*>(segment.data) + batch * segment.strides.batch + head * segment.strides.head;
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
  const float inverse = copysignf(inverse_of(largest, kMostByte), p.scale);
  if (Tokens::lane() < Tokens::kCount) {
    a.images.query_scale[place * kSageQueryRows + Tokens::token(Tokens::lane()) % kSageQueryRows] =
        scale_of(largest, kMostByte) * fabsf(p.scale) * kLog2E;
  }
  std::int8_t* image = a.images.query + place * kSageQueryRows * kChannels;
#pragma unroll
  for (int i = 0; i < Tokens::kCount; ++i) {
    const float of_row = __shfl_sync(kWarp, inverse, i, kLanes);
    const float factor = tokens.has_channels ? of_row : 0;
    const int row = Tokens::token(i) % kSageQueryRows;
    *reinterpret_cast<uint2*>(image + sage_place(kSageQueryRows, sage_row_bytes(kChannels), row, 8 * Tokens::lane())) =
        to_bytes([&](int c) { return widen(tokens.eights[i].x[c]) * factor; });
  }
}

// What a rank has of K or V of a head: a stretch of its blocks of keys, or two.
struct Part {
  int batch;
  int head;
  std::size_t head_index;
  int first_stretch;
  int stretches;
  int first;  // block
  int last;   // past it

  int2 seen[2];  // of a segment's keys, by some row

  __device__ Part(const Arguments& a, unsigned index, unsigned rank) {
    const auto heads = static_cast<unsigned>(a.problem.kv_heads);
    batch = static_cast<int>(index / heads);
    head = static_cast<int>(index % heads);
    head_index = index;
    stretches = a.stretches / a.ranks;
    first_stretch = static_cast<int>(rank) * stretches;
    first = begin_of(a, first_stretch);
    last = begin_of(a, first_stretch + stretches);
    for (int s = 0; s < 2; ++s) seen[s] = a.images.key_blocks[s] != 0 ? seen_keys(a, s, batch) : make_int2(0, 0);
  }
  __device__ static int begin_of(const Arguments& a, int stretch) {
    const unsigned blocks = a.images.key_blocks[0] + a.images.key_blocks[1];
    return static_cast<int>(stretch * blocks / a.stretches);
  }
};

// A block of keys, of which a block of threads has one or two at a time; some row sees [begin, end) of it.
template <int kKeys>
struct Block {
  static constexpr int kThreads = kKeys / kSageWarpRows * 32;
  const KeySegment* segment;
  int batch;
  int head;
  int first;
  int begin;
  int end;
  std::size_t place;  // in the images
  bool is_seen;
  bool is_whole;  // all keys, for all that is known here

  // Which of those that the block of threads has is this thread's.
  __device__ static int index() { return static_cast<int>(threadIdx.x) / kThreads; }
  __device__ static int thread() { return static_cast<int>(threadIdx.x) % kThreads; }
  __device__ static int at_once() { return static_cast<int>(blockDim.x) / kThreads; }

  // Of those from `item` on, before `last`.
  __device__ Block(const Arguments& a, const Part& part, int item, int last) : batch(part.batch), head(part.head) {
    item += index();
    const int* blocks = a.images.key_blocks;
    const int s = item >= blocks[0] ? 1 : 0;
    segment = &a.problem.key_segments[s];
    first = kKeys * (item - (s == 1 ? blocks[0] : 0));
    const int2 seen = s == 1 ? part.seen[1] : part.seen[0];
    begin = max(first, seen.x);
    end = min(first + kKeys, seen.y);
    place = part.head_index * (blocks[0] + blocks[1]) + item;
    is_seen = item < last && begin < end;
    is_whole = end - begin == kKeys && segment->mask.data == nullptr;
  }
  __device__ int key(int token) const { return first + token % kKeys; }
  __device__ bool sees(int key) const { return key >= begin && key < end; }
};

// A part of a block of K or V, of `kParts`.
template <class Tokens, bool kIsKey, int kKeys>
__device__ Tokens read_block(const Arguments& a, const Block<kKeys>& block, int part = 0) {
  const KeySegment& segment = *block.segment;
  const Strides& strides = kIsKey ? segment.key_strides : segment.value_strides;
  const auto* data = static_cast<const typename Tokens::Element*>(kIsKey ? segment.key : segment.value) +
                     block.batch * strides.batch + block.head * strides.head;
  // Tokens are counted from the first of the block of threads.
  const int first = block.first - kKeys * block.index();
  return {data, strides.token, first, block.begin, block.end, static_cast<int>(a.problem.head_size), part};
}

// A channel over all keys that are seen; of K the sum alone.
struct Total {
  float sum;
  float high;
  float low;
  __device__ static Total none() { return {0, -INFINITY, INFINITY}; }
  __device__ void add(const Total& other) {
    sum += other.sum;
    high = fmaxf(high, other.high);
    low = fminf(low, other.low);
  }
};

// Eight channels of a thread's tokens. The extremes of pairs of numbers are found at once.
template <class T, bool kIsKey>
struct EightTotals {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  float sum[8] = {};
  Pair high[4];
  Pair low[4];

  __device__ EightTotals() {
#pragma unroll
    for (int c = 0; c < 4; ++c) high[c] = pair_of(-INFINITY), low[c] = pair_of(INFINITY);
  }
  __device__ void add(const Eight<T>& eight) {
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] += widen(eight.x[c]);
    if constexpr (!kIsKey) {
#pragma unroll
      for (int c = 0; c < 4; ++c) find_extremes(c, reinterpret_cast<const Pair*>(&eight)[c], reinterpret_cast<const Pair*>(&eight)[c]);
    }
  }
  __device__ Total of(int c) const {
    return {sum[c], widen(c % 2 == 0 ? high[c / 2].x : high[c / 2].y), widen(c % 2 == 0 ? low[c / 2].x : low[c / 2].y)};
  }
  // With those of the thread `distance` away.
  __device__ void join(int distance) {
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] += __shfl_xor_sync(kWarp, sum[c], distance);
    if constexpr (!kIsKey) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        find_extremes(c, __shfl_xor_sync(kWarp, high[c], distance), __shfl_xor_sync(kWarp, low[c], distance));
      }
    }
  }

 private:
  __device__ void find_extremes(int c, const Pair& of_high, const Pair& of_low) {
    high[c] = __hmax2(high[c], of_high);
    low[c] = __hmin2(low[c], of_low);
  }
  __device__ static Pair pair_of(float x) {
    if constexpr (std::is_same_v<T, __half>) {
      return __float2half2_rn(x);
    } else {
      return __float2bfloat162_rn(x);
    }
  }
};

// Adds up a stretch of K or V: what a thread has, the threads of a warp, warps, each in order. Gives each channel's
// total to `use`; returns how many of the keys this thread had.
template <class T, int kLanes, int kKeys, bool kAligned, bool kIsKey, class Use>
__device__ int add_up_stretch(const Arguments& a, const Part& part, int stretch, unsigned char* memory,
                              const Use& use) {
  constexpr int kParts = kLanes == 32 || (kLanes == 16 && kKeys == 128) ? 2 : 1;  // where registers are few
  using Tokens = WarpTokens<T, kLanes, kAligned, kParts>;
  constexpr unsigned kChannels = 8 * kLanes;
  EightTotals<T, kIsKey> totals;
  int keys = 0;
  const int last = Part::begin_of(a, stretch + 1);
  for (int item = Part::begin_of(a, stretch); item < last; item += Block<kKeys>::at_once()) {
    const Block<kKeys> block(a, part, item, last);
    if (!block.is_seen) continue;
    const KeyMask mask(*block.segment, block.batch);
#pragma unroll 1
    for (int some = 0; some < kParts; ++some) {
      const Tokens tokens = read_block<Tokens, kIsKey>(a, block, some);
      if (block.is_whole) {
        keys += Tokens::kCount;
#pragma unroll
        for (const Eight<T>& eight : tokens.eights) totals.add(eight);
        continue;
      }
#pragma unroll
      for (int i = 0; i < Tokens::kCount; ++i) {
        const int key = block.key(Tokens::token(i, some));
        if (!block.sees(key) || mask.hides(key)) continue;
        ++keys;
        totals.add(tokens.eights[i]);
      }
    }
  }
  auto* of_warps = reinterpret_cast<Total*>(memory);  // [warps][channels]
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) totals.join(distance);
  __syncthreads();  // those of the stretch before are read
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (threadIdx.x % 32 < kLanes) of_warps[threadIdx.x / 32 * kChannels + 8 * Tokens::lane() + c] = totals.of(c);
  }
  __syncthreads();
  for (unsigned c = threadIdx.x; c < kChannels; c += blockDim.x) {
    Total total = Total::none();
#pragma unroll 1
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total.add(of_warps[warp * kChannels + c]);
    use(c, total);
  }
  return Tokens::lane() == 0 ? keys : 0;
}

// Adds up a head's K or V: stretches, in order. Gives each channel's total and how many keys there are to `use`.
template <class T, int kLanes, int kKeys, bool kAligned, bool kIsKey, class Use>
__device__ void add_up(const Arguments& a, const Part& part, unsigned char* memory, const Use& use) {
  constexpr unsigned kChannels = 8 * kLanes;
  __shared__ Total of_stretches[kMostStretches][kChannels];
  __shared__ int keys_of_rank;
  if (threadIdx.x == 0) keys_of_rank = 0;
  int keys = 0;
  for (int i = 0; i < part.stretches; ++i) {
    keys += add_up_stretch<T, kLanes, kKeys, kAligned, kIsKey>(
        a, part, part.first_stretch + i, memory, [&](unsigned c, const Total& total) { of_stretches[i][c] = total; });
  }
  if (keys != 0) atomicAdd(&keys_of_rank, keys);
  hopper::arrive_cluster();
  hopper::wait_cluster();
  keys = 0;
#pragma unroll 1
  for (unsigned rank = 0; rank < a.ranks; ++rank) keys += *hopper::of_rank(&keys_of_rank, rank);
  for (unsigned c = threadIdx.x; c < kChannels; c += blockDim.x) {
    Total total = Total::none();
#pragma unroll 1
    for (unsigned rank = 0; rank < a.ranks; ++rank) {
      for (int i = 0; i < part.stretches; ++i) total.add(*hopper::of_rank(&of_stretches[i][c], rank));
    }
    const bool is_channel = c < a.problem.head_size && keys != 0;
    use(c, is_channel ? total : Total{0, 0, 0}, static_cast<float>(max(keys, 1)));
  }
  hopper::arrive_cluster();  // the others' sums are read; who ends waits
  __syncthreads();
}

template <class T, int kLanes, int kKeys, bool kAligned>
__device__ void quantize_key(const Arguments& a, const Part& part, bool is_first, unsigned char* memory) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  constexpr int kChannels = 8 * kLanes;
  __shared__ float means[kChannels];
  // Floats that are not negative are ordered as their bits, NaN above all. Three in turn: one is zeroed while the one
  // before may still be read.
  __shared__ int largest_of[3][2][kSageKeyGroups];
  if (threadIdx.x < sizeof(largest_of) / sizeof(int)) largest_of[0][0][threadIdx.x] = 0;
  add_up<T, kLanes, kKeys, kAligned, true>(a, part, memory, [&](unsigned c, const Total& total, float keys) {
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
  const int thread = Block<kKeys>::thread();
  for (int item = part.first, turn = 0; item < part.last; item += Block<kKeys>::at_once(), turn = turn == 2 ? 0 : turn + 1) {
    const Block<kKeys> block(a, part, item, part.last);  // what no row sees stays as it is
    int* largest = largest_of[turn][Block<kKeys>::index()];
    if (thread < kSageKeyGroups) largest_of[turn == 2 ? 0 : turn + 1][Block<kKeys>::index()][thread] = 0;
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
    const float inverse = inverse_of(largest_of_group, kMostByte);
    if (thread < kSageKeyGroups) {
      a.images.key_scale[block.place * kSageKeyGroups + group] = scale_of(largest_of_group, kMostByte);
    }
    float inverses[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) inverses[slot] = __shfl_sync(kWarp, inverse, group_of(slot));
    std::int8_t* image = a.images.key + block.place * kKeys * kChannels;
#pragma unroll
    for (int i = 0; i < Tokens::kCount; ++i) {
      const int row = Tokens::token(i) % kKeys;
      *reinterpret_cast<uint2*>(image + sage_place(kKeys, sage_row_bytes(kChannels), row, 8 * Tokens::lane())) =
          to_bytes([&](int c) { return (widen(tokens.eights[i].x[c]) - mean[c]) * inverses[slot_of(i)]; });
    }
  }
}

template <class T, int kLanes, int kKeys, bool kAligned>
__device__ void quantize_value(const Arguments& a, const Part& part, bool is_first, unsigned char* memory) {
  using Tokens = WarpTokens<T, kLanes, kAligned>;
  struct alignas(4) Two {
    T x[2];
  };
  constexpr int kChannels = 8 * kLanes;
  __shared__ float4 of_pairs[kChannels / 2];  // (x − mean) / scale = x · (x, y) + (z, w)
  add_up<T, kLanes, kKeys, kAligned, false>(a, part, memory, [&](unsigned c, const Total& total, float keys) {
    const float mean = a.quantization.smooth_value ? total.sum / keys : 0;
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
        *reinterpret_cast<uint4*>(image + sage_place(head, kSagePanelKeys, 2 * pair + c, 16 * piece)) =
            to_e4m3([&](int at) { return x[c][at]; });
      }
    }
  }
}

// Blocks that have Q come last: they fill what clusters, which wait for each other, leave.
template <class T, int kLanes, int kKeys, bool kAligned>
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
    return quantize_query<T, kLanes, kAligned>(a, index * kTiles + threadIdx.x / kThreads);
  }
  const bool is_key = cluster < a.heads;
  const Part part(a, is_key ? cluster : cluster - a.heads, rank);
  if (is_key) {
    quantize_key<T, kLanes, kKeys, kAligned>(a, part, rank == 0, memory);
  } else {
    quantize_value<T, kLanes, kKeys, kAligned>(a, part, rank == 0, memory);
  }
  hopper::wait_cluster();
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
