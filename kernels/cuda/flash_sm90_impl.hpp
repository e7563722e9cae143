#pragma once

/// Exact attention on Hopper. Background: FlashAttention-3 (arXiv 2407.08608). Approach: one producer thread copies
/// tiles of Q, K and V to shared memory; warpgroups of 64 rows each multiply, Q · Kᵀ of a block under the softmax of
/// the one before, and take turns, so that one's softmax runs under another's products. Included by .cu files alone.

#include <type_traits>

#include "kernels/cuda/flash_rows_impl.hpp"
#include "kernels/cuda/hopper_pipeline_impl.hpp"
#include "kernels/cuda/wgmma.hpp"

namespace ditattn::kernels::cuda {

/// How the kernel is cut. Head sizes up to kHeadSize (a multiple of 8) take it; channels past the tensor's are zeros.
template <class Element, int kHeadSize, int kGroups, int kBlockKeys, int kDepth>
struct FlashSm90Config {
  using T = Element;
  static constexpr int kHead = kHeadSize;
  static constexpr int kWarpgroups = kGroups;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kBlockKeys;
  static constexpr int kStages = kDepth;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kPanels = (kHead + 63) / 64;          // of 64 channels, 128 bytes
  static constexpr int kQueryBytes = 64 * kPanels * 128;     // of a warpgroup
  static constexpr int kStageBytes = kKeys * kPanels * 128;  // of K, or of V
  static constexpr int kBarriers = 2 * kGroups + 4 * kStages;
  static constexpr int shared_bytes(int slabs) {
    return slabs * kGroups * kQueryBytes + 2 * kStages * kStageBytes + 8 * (kBarriers + 1);
  }
  // The output goes by way of shared memory: its own, or, where there is no room, that of Q.
  static constexpr int kMostSharedBytes = 227 * 1024;  // of a block
  static constexpr bool kOutputSlab = shared_bytes(2) <= kMostSharedBytes;
  static constexpr int kSharedBytes = shared_bytes(kOutputSlab ? 2 : 1);
  static constexpr int kProducerRegisters = WarpgroupRegisters<kGroups>::kProducer;
  static constexpr int kConsumerRegisters = WarpgroupRegisters<kGroups>::kConsumer;
  static_assert(kKeys % 16 == 0);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

struct FlashSm90Arguments {
  CUtensorMap out[2];  ///< as query
  CUtensorMap query[2];
  CUtensorMap key[2];
  CUtensorMap value[2];
  AttentionProblem problem;
  TileOrder order;
  bool hides;    ///< some row does not see some key
  bool differs;  ///< rows of a batch entry see different keys
};

/// Where tiles and barriers are in shared memory. Each warpgroup has its own rows of Q.
template <class Config>
struct FlashSm90Memory {
  hopper::Address base;
  __device__ hopper::Address query(int group) const { return base + group * Config::kQueryBytes; }
  __device__ hopper::Address output(int group) const {
    return query(Config::kOutputSlab ? Config::kWarpgroups + group : group);
  }
  __device__ hopper::Address key(int stage) const {
    return query((Config::kOutputSlab ? 2 : 1) * Config::kWarpgroups) + stage * Config::kStageBytes;
  }
  __device__ hopper::Address value(int stage) const { return key(Config::kStages + stage); }
  __device__ hopper::Address barrier(int i) const { return key(2 * Config::kStages) + 8 * i; }
  __device__ hopper::Address key_full(int stage) const { return barrier(stage); }
  __device__ hopper::Address key_empty(int stage) const { return barrier(Config::kStages + stage); }
  __device__ hopper::Address value_full(int stage) const { return barrier(2 * Config::kStages + stage); }
  __device__ hopper::Address value_empty(int stage) const { return barrier(3 * Config::kStages + stage); }
  __device__ hopper::Address query_full(int group) const { return barrier(4 * Config::kStages + group); }
  __device__ hopper::Address query_empty(int group) const { return query_full(Config::kWarpgroups + group); }
  __device__ hopper::Address unused() const { return barrier(Config::kBarriers); }
};

// Boxes of 64 channels of `rows` tokens, one beside the other.
template <int kPanels>
__device__ __forceinline__ void copy_rows(hopper::Address to, const CUtensorMap* map, hopper::Address full, int rows,
                                          int token, int head, int batch) {
  hopper::arrive_expect(full, kPanels * rows * 128);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    hopper::copy_box(to + panel * rows * 128, map, full, 64 * panel, token, head, batch);
  }
}

// `load_more(tile, segment, key, stage)` may copy what else comes with the block of K that is loaded there.
template <class Config, class Arguments, class LoadMore>
__device__ __forceinline__ void produce(const Arguments& a, const FlashSm90Memory<Config>& memory,
                                        const LoadMore& load_more) {
  TileWalk<Config, Arguments> tiles(a);
  const bool leader = threadIdx.x % 32 == 0;
  RingPlace<Config::kStages> key_place;
  RingPlace<Config::kStages> value_place;
  int query_parity = 0;
  while (tiles.next()) {
    const Tile& tile = tiles.tile();
    const KeyBlocks<Config::kKeys>& blocks = tiles.blocks();
    const int total = blocks.total();
    if (!leader || total == 0) continue;
    const auto load = [&](int i, const CUtensorMap* maps, hopper::Address to, hopper::Address full) {
      copy_rows<Config::kPanels>(to, &maps[blocks.segment_of(i)], full, Config::kKeys, blocks.key_of(i), tile.kv_head,
                                 tile.batch);
    };
    const auto load_key = [&](int i) {
      hopper::wait(memory.key_empty(key_place.stage), key_place.parity ^ 1);
      load_more(tile, blocks.segment_of(i), blocks.key_of(i), key_place.stage);
      load(i, a.key, memory.key(key_place.stage), memory.key_full(key_place.stage));
      key_place.advance();
    };
    load_key(0);
    for (int group = 0; group < Config::kWarpgroups; ++group) {
      hopper::wait(memory.query_empty(group), query_parity ^ 1);
      copy_rows<Config::kPanels>(memory.query(group), &a.query[tile.segment], memory.query_full(group), 64,
                                 tile.row + 64 * group, tile.head, tile.batch);
    }
    query_parity ^= 1;
    for (int i = 0; i < total; ++i) {
      if (i + 1 < total) load_key(i + 1);
      hopper::wait(memory.value_empty(value_place.stage), value_place.parity ^ 1);
      load(i, a.value, memory.value(value_place.stage), memory.value_full(value_place.stage));
      value_place.advance();
    }
  }
}

template <class Config>
__device__ __forceinline__ void multiply_keys(float (&logits)[Config::kKeys / 2], hopper::Address query,
                                              hopper::Address key, bool accumulate) {
  const std::uint64_t a = hopper::describe(query, 0);
  const std::uint64_t b = hopper::describe(key, 0);
#pragma unroll
  for (int k = 0; k < (Config::kHead + 15) / 16; ++k) {
    const int panel = k / 4;
    const int in_panel = k % 4 * 32;
    Wgmma<typename Config::T, Config::kKeys>::ss(logits, a + (panel * 64 * 128 + in_panel) / 16,
                                                 b + (panel * Config::kKeys * 128 + in_panel) / 16,
                                                 accumulate || k != 0);
  }
}

template <class Config>
__device__ __forceinline__ void multiply_values(float (&out)[Config::kHead / 2],
                                                const std::uint32_t (&probabilities)[Config::kKeys / 4],
                                                hopper::Address value, int accumulate) {
  const std::uint64_t b = hopper::describe(value, Config::kKeys * 128);
#pragma unroll
  for (int k = 0; k < Config::kKeys / 16; ++k) {
    Wgmma<typename Config::T, Config::kHead>::rs(out, probabilities + 4 * k, b + k * 16 * 128 / 16,
                                                 k != 0 ? 1 : accumulate);
  }
}

template <class Config, bool kMasked>
__device__ __forceinline__ void consume(const FlashSm90Arguments& a, const FlashSm90Memory<Config>& memory) {
  using T = typename Config::T;
  const AttentionProblem& p = a.problem;
  TileWalk<Config, FlashSm90Arguments> tiles(a);
  const int group = static_cast<int>(__shfl_sync(kWarp, threadIdx.x / 128, 0)) - 1;
  const int warp_row = static_cast<int>(threadIdx.x / 32 - 4) * 16;
  const float scale[2] = {p.scale * kLog2E, p.scale * kLog2E};
  RingPlace<Config::kStages> key_place;
  RingPlace<Config::kStages> value_place;
  int query_parity = 0;
  bool broken = false;  // an output of this warp is not finite
  const WarpgroupTurns<Config::kWarpgroups> turns{group};
  turns.begin();

  while (tiles.next()) {
    const Tile& tile = tiles.tile();
    const KeyBlocks<Config::kKeys>& blocks = tiles.blocks();
    const int total_blocks = blocks.total();
    if (total_blocks == 0) {
      store_nothing<T>(p, tile, warp_row);
      continue;
    }
    Softmax softmax;
    float out[Config::kHead / 2];
    float logits[Config::kKeys / 2];
    float total[2];
    float rescale[2];
    std::uint32_t probabilities[Config::kKeys / 4];
    RowLimits limits;
    SeenBits<Config::kKeys> seen;
    // Where a block has hidden keys, or is the first that has none, or logits differ much, steps are exact. A single
    // row does not choose between the two kinds of steps: all of a warpgroup has to go the same way.
    const auto look_at_keys = [&](int i) {
      const KeySegment& segment = p.key_segments[blocks.segment_of(i)];
      limits.find(p, segment, tile, warp_row);
      seen.see_all();
      if constexpr (kMasked) apply_mask(p, segment, tile, warp_row, blocks.key_of(i), logits, seen);
    };
    const auto hide_keys = [&](int i) {
      seen.limit(limits, blocks.key_of(i));
      seen.hide(logits);
    };
    const auto soften_exactly = [&] {
      softmax.find_reference(logits, scale, rescale);
      softmax.exponentiate(logits, scale);
      softmax.add(logits, total);
    };
    const auto round = [&] {
#pragma unroll
      for (int k = 0; k < 2; ++k) softmax.sum[k] = fmaf(softmax.sum[k], rescale[k], total[k]);
#pragma unroll
      for (int j = 0; j < Config::kKeys / 4; ++j) probabilities[j] = pack(logits[2 * j], logits[2 * j + 1], T{});
    };

    if (kMasked || blocks.hides(0)) look_at_keys(0);
    const hopper::Address query = memory.query(group);
    hopper::wait(memory.query_full(group), query_parity);
    query_parity ^= 1;
    hopper::wait(memory.key_full(key_place.stage), key_place.parity);
    turns.take();
    hopper::pin(logits);
    hopper::fence_products();
    multiply_keys<Config>(logits, query, memory.key(key_place.stage), kMasked);
    hopper::commit_products();
    turns.pass();
    hopper::wait_products<0>();
    hopper::pin(logits);
    release(memory.key_empty(key_place.stage));
    key_place.advance();
    if (blocks.hides(0)) hide_keys(0);
    // Where logits differ much, all steps are exact.
    const bool is_wild = Softmax::are_wild(logits, scale);
    soften_exactly();
    round();
    const bool wild = __any_sync(kWarp, total_blocks > 1 && hopper::any_named(8 + group, 128, is_wild));
    // Block i's logits under the output of the block before. No branch while products are unfinished: the compiler
    // would wait for them there.
    const auto step = [&](int i, auto exact) {
      if constexpr (decltype(exact)::value) look_at_keys(i);
      hopper::wait(memory.key_full(key_place.stage), key_place.parity);
      turns.take();
      hopper::pin(logits);
      hopper::pin(out);
      hopper::pin(probabilities);
      hopper::fence_products();
      multiply_keys<Config>(logits, query, memory.key(key_place.stage), kMasked && decltype(exact)::value);
      hopper::commit_products();
      hopper::wait(memory.value_full(value_place.stage), value_place.parity);
      hopper::fence_products();
      multiply_values<Config>(out, probabilities, memory.value(value_place.stage), i > 1);
      hopper::commit_products();
      turns.pass();
      hopper::wait_products<1>();
      hopper::pin(logits);
      release(memory.key_empty(key_place.stage));
      key_place.advance();
      if constexpr (decltype(exact)::value) {
        hide_keys(i);
        soften_exactly();
      } else {
        softmax.exponentiate(logits, scale);
        softmax.add(logits, total);
      }
      hopper::hold_waits_for(total[0] + total[1], memory.unused());
      hopper::wait_products<0>();
      hopper::pin(out);
      hopper::pin(probabilities);
      release(memory.value_empty(value_place.stage));
      value_place.advance();
      bool moves;
      if constexpr (decltype(exact)::value) {
        moves = rescale[0] != 1 || rescale[1] != 1;
      } else {
        moves = fmaxf(total[0], total[1]) > Softmax::kLargest;
        rescale[0] = rescale[1] = 1;
      }
      if (__any_sync(kWarp, moves)) {
        if constexpr (!decltype(exact)::value) softmax.lower(logits, total, rescale);
#pragma unroll
        for (int j = 0; j < Config::kHead / 2; ++j) out[j] *= rescale[j / 2 % 2];
      }
      round();
    };
    bool anchored = !wild && !blocks.hides(0);
    for (int i = 1; i < total_blocks;) {
      const bool exact = !anchored || blocks.hides(i);
      if (exact) {
        step(i, std::true_type{});
        anchored = anchored || (!wild && !blocks.hides(i));
        ++i;
        continue;
      }
      const int end = blocks.full_end(i);
#pragma unroll 1
      for (; i < end; ++i) step(i, std::false_type{});
    }
    if constexpr (Config::kOutputSlab) release(memory.query_empty(group));
    hopper::wait(memory.value_full(value_place.stage), value_place.parity);
    hopper::pin(out);
    hopper::pin(probabilities);
    hopper::fence_products();
    multiply_values<Config>(out, probabilities, memory.value(value_place.stage), total_blocks > 1);
    hopper::commit_products();
    hopper::wait_products<0>();
    hopper::pin(out);
    release(memory.value_empty(value_place.stage));
    value_place.advance();
    softmax.finish();
    const float factor[2] = {factor_of(softmax, 0), factor_of(softmax, 1)};
    broken = are_broken(factor, a.hides, out) || broken;
    if constexpr (!Config::kOutputSlab) hopper::sync_named(8 + group, 128);  // all have read Q
    // The output goes by way of shared memory, a warp's rows by themselves: while they are copied, the next tile
    // begins.
    const hopper::Address scratch = memory.output(group) + warp_row % 64 * Config::kPanels * 128;
    hopper::wait_read_out();
    __syncwarp();
    gather_rows<T>(scratch, factor, out);
    hopper::fence_copies();
    __syncwarp();
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      hopper::copy_box_out(threadIdx.x % 32 == 0, &a.out[tile.segment], scratch + panel * 2048, 64 * panel,
                           tile.row + warp_row, tile.head, tile.batch);
    }
    store_lse(p, tile, warp_row, softmax);
    if constexpr (!Config::kOutputSlab) {
      hopper::wait_read_out();
      __syncwarp();
      release(memory.query_empty(group));
    }
  }
  if (!broken) return hopper::wait_read_out();  // the launch's end waits for the writes
  // In a loop of its own: what may diverge in a warp costs the other loop its uniform registers.
  hopper::wait_copied_out();
  __syncwarp();
  TileWalk<Config, FlashSm90Arguments> again(a);
  while (again.next()) mend_rows<T, Config::kHead>(p, again.tile(), warp_row);
}

// Makes the barriers; kKeyReaders: threads of a warp that give a stage of K back.
template <int kKeyReaders = 1, class Config, class Arguments>
__device__ __forceinline__ void prepare(const Arguments& arguments, const FlashSm90Memory<Config>& memory) {
  constexpr int kConsumerWarps = 4 * Config::kWarpgroups;
  if (threadIdx.x == 32) {
    hopper::prefetch(&arguments.key[0]);
    hopper::prefetch(&arguments.query[0]);
    hopper::prefetch(&arguments.value[0]);
    hopper::prefetch(&arguments.out[0]);
  }
  if (threadIdx.x == 0) {
    for (int group = 0; group < Config::kWarpgroups; ++group) {
      hopper::init_barrier(memory.query_full(group), 1);
      hopper::init_barrier(memory.query_empty(group), 4);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      hopper::init_barrier(memory.key_full(stage), 1);
      hopper::init_barrier(memory.value_full(stage), 1);
      hopper::init_barrier(memory.key_empty(stage), kKeyReaders * kConsumerWarps);
      hopper::init_barrier(memory.value_empty(stage), kConsumerWarps);
    }
    hopper::fence_barrier_init();
  }
}

/// `kMasked`: some key segment has a mask.
template <class Config, bool kMasked>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_sm90(const __grid_constant__ FlashSm90Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char memory_bytes[];
  const FlashSm90Memory<Config> memory{hopper::address_of(memory_bytes)};
  prepare(arguments, memory);
  hopper::start_next_launch();
  __syncthreads();
  if (threadIdx.x < 128) {
    hopper::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x < 32) produce(arguments, memory, [](const Tile&, int, int, int) {});
  } else {
    hopper::take_registers<Config::kConsumerRegisters>();
    consume<Config, kMasked>(arguments, memory);
  }
}

}  // namespace ditattn::kernels::cuda
