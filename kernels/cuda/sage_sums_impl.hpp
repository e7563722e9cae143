#pragma once

/// K and V of a head, as some blocks of threads have them: which blocks of keys, and their sums. Included by
/// sage_quantize_impl.hpp alone.

#include <type_traits>

#include "kernels/cuda/hopper_impl.hpp"
#include "kernels/cuda/sage_numbers_impl.hpp"
#include "kernels/cuda/sage_quantize.hpp"
#include "kernels/cuda/seen_keys_impl.hpp"

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
constexpr int kBlocksAtOnce = kLanes == 8                   ? 4
                              : kLanes == 16 && kKeys == 64 ? 2
                                                            : 3;

struct Arguments {
  AttentionProblem problem;
  SageQuantization quantization;
  SageImages images;
  unsigned heads;      // of K, then as many of V; the blocks after theirs have Q
  unsigned stretches;  // of keys, whose sums are added up in order: by the lengths alone
  unsigned ranks;      // blocks of threads that have K or V of a head together, one stretch or two each
};

// What a rank has of K or V of a head: a stretch of its blocks of keys, or two.
struct Part {
  int batch;
  int head;
  std::size_t head_index;
  int first_stretch;
  int stretches;
  int first;     // block
  int last;      // past it
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
    for (int s = 0; s < 2; ++s)
      seen[s] = a.images.key_blocks[s] != 0 ? seen_keys(a.problem, a.images.seen, s, batch) : make_int2(0, 0);
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

// What a thread reads of a block of K or V, or one of some parts of that.
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

__device__ SageTotal no_total() { return {0, -INFINITY, INFINITY}; }
__device__ void add_to(SageTotal& total, const SageTotal& other) {
  total.sum += other.sum;
  total.high = fmaxf(total.high, other.high);
  total.low = fminf(total.low, other.low);
}

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
      for (int c = 0; c < 4; ++c) {
        const Pair& pair = reinterpret_cast<const Pair*>(&eight)[c];
        find_extremes(c, pair, pair);
      }
    }
  }
  __device__ SageTotal of(int c) const {
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
  auto* of_warps = reinterpret_cast<SageTotal*>(memory);  // [warps][channels]
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) totals.join(distance);
  __syncthreads();  // those of the stretch before are read
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (threadIdx.x % 32 < kLanes) of_warps[threadIdx.x / 32 * kChannels + 8 * Tokens::lane() + c] = totals.of(c);
  }
  __syncthreads();
  for (unsigned c = threadIdx.x; c < kChannels; c += blockDim.x) {
    SageTotal total = no_total();
#pragma unroll 1
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) add_to(total, of_warps[warp * kChannels + c]);
    use(c, total);
  }
  return Tokens::lane() == 0 ? keys : 0;
}

// How blocks of threads that have K or V of a head come by its sums, of stretches, in order, and which numbers Q and K
// become. `find` gives each channel's total and how many keys there are to `use`.

// They are a cluster: each adds up its own, and reads the others'. One kind of numbers is compiled: with both, the
// kernel for head size 256 is 6 % slower.
template <bool kIsFp8>
struct InCluster {
  static constexpr bool kSharesSums = true;
  __device__ static bool is_fp8(const Arguments&) { return kIsFp8; }

  template <class T, int kLanes, int kKeys, bool kAligned, bool kIsKey, class Use>
  __device__ static void find(const Arguments& a, const Part& part, unsigned char* memory, const Use& use) {
    constexpr unsigned kChannels = 8 * kLanes;
    __shared__ SageTotal of_stretches[kMostStretches][kChannels];
    __shared__ int keys_of_rank;
    if (threadIdx.x == 0) keys_of_rank = 0;
    int keys = 0;
    for (int i = 0; i < part.stretches; ++i) {
      keys += add_up_stretch<T, kLanes, kKeys, kAligned, kIsKey>(
          a, part, part.first_stretch + i, memory,
          [&](unsigned c, const SageTotal& total) { of_stretches[i][c] = total; });
    }
    if (keys != 0) atomicAdd(&keys_of_rank, keys);
    hopper::arrive_cluster();
    hopper::wait_cluster();
    keys = 0;
#pragma unroll 1
    for (unsigned rank = 0; rank < a.ranks; ++rank) keys += *hopper::of_rank(&keys_of_rank, rank);
    for (unsigned c = threadIdx.x; c < kChannels; c += blockDim.x) {
      SageTotal total = no_total();
#pragma unroll 1
      for (unsigned rank = 0; rank < a.ranks; ++rank) {
        for (int i = 0; i < part.stretches; ++i) add_to(total, *hopper::of_rank(&of_stretches[i][c], rank));
      }
      const bool is_channel = c < a.problem.head_size && keys != 0;
      use(c, is_channel ? total : SageTotal{0, 0, 0}, static_cast<float>(max(keys, 1)));
    }
    hopper::arrive_cluster();  // the others' sums are read; who ends waits
    __syncthreads();
  }
  __device__ static void end() { hopper::wait_cluster(); }
};

// The launch before left the sums.
struct InTwoLaunches {
  static constexpr bool kSharesSums = false;
  __device__ static bool is_fp8(const Arguments& a) { return a.quantization.fp8_logits; }

  // Of a head's K or V.
  __device__ static unsigned place(const Arguments& a, const Part& part, bool is_key) {
    return (static_cast<unsigned>(part.head_index) + (is_key ? 0 : a.heads)) * a.stretches;
  }
  template <class T, int kLanes, int kKeys, bool kAligned, bool kIsKey>
  __device__ static void leave(const Arguments& a, const Part& part, unsigned char* memory) {
    __shared__ int keys_of_stretch;
    if (threadIdx.x == 0) keys_of_stretch = 0;
    const unsigned at = place(a, part, kIsKey) + part.first_stretch;
    SageTotal* totals = a.images.totals + std::size_t{at} * 8 * kLanes;
    const int keys = add_up_stretch<T, kLanes, kKeys, kAligned, kIsKey>(
        a, part, part.first_stretch, memory, [&](unsigned c, const SageTotal& total) { totals[c] = total; });
    if (keys != 0) atomicAdd(&keys_of_stretch, keys);
    __syncthreads();
    if (threadIdx.x == 0) a.images.total_keys[at] = keys_of_stretch;
  }
  template <class T, int kLanes, int kKeys, bool kAligned, bool kIsKey, class Use>
  __device__ static void find(const Arguments& a, const Part& part, unsigned char*, const Use& use) {
    constexpr unsigned kChannels = 8 * kLanes;
    const unsigned first = place(a, part, kIsKey);
    int keys = 0;
    for (unsigned i = 0; i < a.stretches; ++i) keys += a.images.total_keys[first + i];
    for (unsigned c = threadIdx.x; c < kChannels; c += blockDim.x) {
      SageTotal total = no_total();
      for (unsigned i = 0; i < a.stretches; ++i) {
        add_to(total, a.images.totals[std::size_t{first + i} * kChannels + c]);
      }
      const bool is_channel = c < a.problem.head_size && keys != 0;
      use(c, is_channel ? total : SageTotal{0, 0, 0}, static_cast<float>(max(keys, 1)));
    }
    __syncthreads();
  }
  __device__ static void end() {}
};

}  // namespace
}  // namespace ditattn::kernels::cuda
