#pragma once

/// Quantized attention on Hopper. Background: SageAttention 2++ (arXiv 2505.21136). Approach: flash_sm90's pipeline
/// with products of bytes: Q · Kᵀ in whole numbers or e4m3, P · V in e4m3. Tensor cores add up e4m3 products to about
/// 14 bits, so what a few blocks give goes to a second sum in float32, in shared memory. Included by .cu files alone.

#include <cuda_fp8.h>

#include <type_traits>

#include "kernels/cuda/hopper_pipeline_impl.hpp"
#include "kernels/cuda/sage_sm90_memory_impl.hpp"
#include "kernels/cuda/wgmma.hpp"

namespace ditattn::kernels::cuda {

template <class Config>
__device__ __forceinline__ void produce_sage(const SageSm90Arguments& a, const SageSm90Memory<Config>& memory) {
  const SageImages& images = a.images;
  TileWalk<Config, SageSm90Arguments> tiles(a);
  const bool leader = threadIdx.x % 32 == 0;
  RingPlace<Config::kStages> key_place;
  RingPlace<Config::kStages> value_place;
  int query_parity = 0;
  while (tiles.next()) {
    const Tile& tile = tiles.tile();
    const KeyBlocks<Config::kKeys>& blocks = tiles.blocks();
    const int total = blocks.total();
    if (!leader || total == 0) continue;
    const auto place_of = [&](int i) {
      return block_of(a.problem, images, tile, blocks.segment_of(i), blocks.key_of(i) / Config::kKeys);
    };
    const auto load_key = [&](int i) {
      hopper::wait(memory.key_empty(key_place.stage), key_place.parity ^ 1);
      const hopper::Address full = memory.key_full(key_place.stage);
      const std::size_t block = place_of(i);
      hopper::arrive_expect(full, Config::kKeyBytes + 4 * kSageKeyGroups);
      hopper::copy_bytes(memory.key(key_place.stage), images.key + block * Config::kKeyBytes, Config::kKeyBytes, full);
      hopper::copy_bytes(memory.key_scale(key_place.stage), images.key_scale + block * kSageKeyGroups,
                         4 * kSageKeyGroups, full);
      key_place.advance();
    };
    load_key(0);
    const std::size_t first_tile = query_tile_of(a.problem, images, tile);
    const int last = images.query_tiles[tile.segment] - 1 - tile.row / kSageQueryRows;
    for (int group = 0; group < Config::kWarpgroups; ++group) {
      // Past the last there is none: what is read instead is not used.
      const std::size_t at = first_tile + min(group, last);
      hopper::wait(memory.query_empty(group), query_parity ^ 1);
      const hopper::Address full = memory.query_full(group);
      hopper::arrive_expect(full, Config::kQueryBytes + Config::kScaleBytes);
      hopper::copy_bytes(memory.query(group), images.query + at * Config::kQueryBytes, Config::kQueryBytes, full);
      hopper::copy_bytes(memory.query_scale(group), images.query_scale + at * kSageQueryRows, Config::kScaleBytes,
                         full);
    }
    query_parity ^= 1;
    for (int i = 0; i < total; ++i) {
      if (i + 1 < total) load_key(i + 1);
      hopper::wait(memory.value_empty(value_place.stage), value_place.parity ^ 1);
      const hopper::Address full = memory.value_full(value_place.stage);
      hopper::arrive_expect(full, Config::kValueBytes);
      hopper::copy_bytes(memory.value(value_place.stage), images.value + place_of(i) * Config::kValueBytes,
                         Config::kValueBytes, full);
      value_place.advance();
    }
  }
}

// A warpgroup's rows of Q, as the products want them in registers: from shared memory they would take all its
// bandwidth.
template <class Config>
__device__ __forceinline__ void load_query(std::uint32_t (&query)[Config::kSteps * 4], hopper::Address tile,
                                           int warp_row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int k = 0; k < Config::kSteps; ++k) {
    const int place = sage_place(64, Config::kRowBytes, warp_row % 64 + lane % 16, 32 * k + lane / 16 * 16);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(query[4 * k]), "=r"(query[4 * k + 1]), "=r"(query[4 * k + 2]), "=r"(query[4 * k + 3])
                 : "r"(tile + place)
                 : "memory");
  }
}

template <class Config>
__device__ __forceinline__ void multiply_bytes(typename Config::Product (&products)[Config::kKeys / 2],
                                               const std::uint32_t (&query)[Config::kQueryRegisters],
                                               hopper::Address query_tile, hopper::Address key) {
  using Products = typename Config::Products;
  const std::uint64_t a = hopper::describe_bytes(query_tile, Config::kRowBytes);
  const std::uint64_t b = hopper::describe_bytes(key, Config::kRowBytes);
#pragma unroll
  for (int k = 0; k < Config::kSteps; ++k) {
    const int panel = 32 * k / Config::kRowBytes;
    const int in_panel = 32 * k % Config::kRowBytes;
    const std::uint64_t keys = b + (panel * Config::kKeys * Config::kRowBytes + in_panel) / 16;
    if constexpr (Config::kHoldsQuery) {
      Products::rs(products, query + 4 * k, keys, 1);
    } else {
      Products::ss(products, a + (panel * 64 * Config::kRowBytes + in_panel) / 16, keys, 1);
    }
  }
}

template <class Config>
__device__ __forceinline__ void multiply_values(float (&out)[Config::kHead / 2],
                                                const std::uint32_t (&probabilities)[Config::kKeys / 8],
                                                hopper::Address value, int accumulate) {
  const std::uint64_t b = hopper::describe_bytes(value, kSagePanelKeys);
#pragma unroll
  for (int k = 0; k < Config::kKeys / kSagePanelKeys; ++k) {
    Wgmma<__nv_fp8_e4m3, Config::kHead>::rs(out, probabilities + 4 * k, b + k * Config::kHead * kSagePanelKeys / 16,
                                            k != 0 ? 1 : accumulate);
  }
}

__device__ __forceinline__ float load_shared(hopper::Address address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

template <class Config>
__device__ __forceinline__ void consume_sage(const SageSm90Arguments& a, const SageSm90Memory<Config>& memory) {
  using T = typename Config::T;
  using Softmax = BasicSoftmax<typename Config::Limits>;
  const AttentionProblem& p = a.problem;
  TileWalk<Config, SageSm90Arguments> tiles(a);
  const int group = static_cast<int>(__shfl_sync(kWarp, threadIdx.x / 128, 0)) - 1;
  const int warp_row = static_cast<int>(threadIdx.x / 32 - 4) * 16;
  const int lane = static_cast<int>(threadIdx.x % 32);
  RingPlace<Config::kStages> key_place;
  RingPlace<Config::kStages> value_place;
  int query_parity = 0;
  bool broken = false;  // an output of this warp is not finite
  const hopper::Address scratch = memory.output(group) + warp_row % 64 * Config::kHead * 4;
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
    SecondSums<Config::kHead / 2> second(scratch);
    float out[Config::kHead / 2];
    typename Config::Product products[Config::kKeys / 2];
    float logits[Config::kKeys / 2];
    float query_scale[2];
    float of_group = 0;
    float scale[2];
    float total[2];
    float rescale[2];
    std::uint32_t probabilities[Config::kKeys / 8];
    int added = 0;  // blocks in `out`
    // The threads that give a stage of K back read its scales; the others get them under the products.
    const auto read_scale = [&] {
      if (lane < kSageKeyGroups) of_group = load_shared(memory.key_scale(key_place.stage) + lane * 4);
    };
    const auto release_key = [&] {
      if (lane < kSageKeyGroups) hopper::arrive(memory.key_empty(key_place.stage));
    };
    const auto find_scale = [&] {
      const float of_keys = __shfl_sync(kWarp, of_group, lane % kSageKeyGroups);
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[i] = above_zero(query_scale[i] * of_keys);
    };
    const auto start_products = [&] {
#pragma unroll
      for (auto& product : products) {
        if constexpr (Config::kIsFp8) {
          product = Softmax::kOrigin;
        } else {
          product = __float_as_int(Softmax::kOrigin);
        }
      }
    };
    const auto to_logits = [&] {
#pragma unroll
      for (int k = 0; k < Config::kKeys / 2; ++k) {
        if constexpr (Config::kIsFp8) {
          logits[k] = products[k];
        } else {
          logits[k] = __int_as_float(products[k]);
        }
      }
    };
    const auto hide = [&](int i) {
      hide_keys<Config::kKeys>(p, a.images, tile, warp_row, blocks.segment_of(i), blocks.key_of(i), logits);
    };
    const auto soften_exactly = [&] {
      softmax.find_reference(logits, scale, rescale);
      softmax.exponentiate(logits, scale);
      softmax.add(logits, total);
    };
    const auto round = [&] {
#pragma unroll
      for (int k = 0; k < 2; ++k) softmax.sum[k] = fmaf(softmax.sum[k], rescale[k], total[k]);
      round_to_e4m3<Config::kKeys>(logits, probabilities);
    };

    std::uint32_t query[Config::kQueryRegisters];
    hopper::wait(memory.query_full(group), query_parity);
    query_parity ^= 1;
    if constexpr (Config::kHoldsQuery) load_query<Config>(query, memory.query(group), warp_row);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      query_scale[i] = load_shared(memory.query_scale(group) + (warp_row % 64 + lane / 4 + 8 * i) * 4);
    }
    if constexpr (Config::kHoldsQuery) hopper::arrive(memory.query_empty(group));
    hopper::wait(memory.key_full(key_place.stage), key_place.parity);
    read_scale();
    start_products();
    turns.take();
    hopper::pin(products);
    if constexpr (Config::kHoldsQuery) hopper::pin(query);
    hopper::fence_products();
    multiply_bytes<Config>(products, query, memory.query(group), memory.key(key_place.stage));
    hopper::commit_products();
    turns.pass();
    find_scale();
    hopper::wait_products<0>();
    hopper::pin(products);
    release_key();
    key_place.advance();
    to_logits();
    if (blocks.hides(0)) hide(0);
    // Where logits differ much, all steps are exact.
    const bool is_wild = Softmax::are_wild(logits, scale);
    soften_exactly();
    round();
    const bool wild = __any_sync(kWarp, total_blocks > 1 && hopper::any_named(8 + group, 128, is_wild));
    // Block i's logits under the output of the block before. No branch while products are unfinished: the compiler
    // would wait for them there.
    const auto step = [&](int i, auto exact) {
      hopper::wait(memory.key_full(key_place.stage), key_place.parity);
      read_scale();
      start_products();
      turns.take();
      hopper::pin(products);
      if constexpr (Config::kHoldsQuery) hopper::pin(query);
      hopper::pin(out);
      hopper::pin(probabilities);
      hopper::fence_products();
      multiply_bytes<Config>(products, query, memory.query(group), memory.key(key_place.stage));
      hopper::commit_products();
      hopper::wait(memory.value_full(value_place.stage), value_place.parity);
      hopper::fence_products();
      multiply_values<Config>(out, probabilities, memory.value(value_place.stage), added);
      hopper::commit_products();
      turns.pass();
      find_scale();
      hopper::wait_products<1>();
      hopper::pin(products);
      release_key();
      key_place.advance();
      to_logits();
      if constexpr (decltype(exact)::value) {
        if (blocks.hides(i)) hide(i);
        soften_exactly();
      } else {
        softmax.exponentiate(logits, scale);
        softmax.add(logits, total);
      }
      hopper::wait_products<0>();
      hopper::pin(out);
      hopper::pin(probabilities);
      release(memory.value_empty(value_place.stage));
      value_place.advance();
      if (++added == Config::kFlushBlocks) {
        second.add(out);
        added = 0;
      }
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
        second.multiply(rescale);
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
    if constexpr (!Config::kHoldsQuery) hopper::arrive(memory.query_empty(group));
    hopper::wait(memory.value_full(value_place.stage), value_place.parity);
    hopper::pin(out);
    hopper::pin(probabilities);
    hopper::fence_products();
    multiply_values<Config>(out, probabilities, memory.value(value_place.stage), added);
    hopper::commit_products();
    hopper::wait_products<0>();
    hopper::pin(out);
    release(memory.value_empty(value_place.stage));
    value_place.advance();
    second.give(out);
    softmax.finish();
    const float factor[2] = {factor_of(softmax, 0), factor_of(softmax, 1)};
    finish_rows<Config::kHead>(p, a.images, tile, softmax, factor, out);
    const float one[2] = {1, 1};
    broken = are_broken(factor, true, out) || broken;
    // The output goes by way of shared memory, a warp's rows by themselves: while they are copied, the next tile
    // begins.
    hopper::wait_read_out();
    __syncwarp();
    gather_rows<T>(scratch, one, out);
    if (a.maps_output) {
      hopper::fence_copies();
      __syncwarp();
#pragma unroll
      for (int panel = 0; panel < (Config::kHead + 63) / 64; ++panel) {
        hopper::copy_box_out(lane == 0, &a.out[tile.segment], scratch + panel * 2048, 64 * panel, tile.row + warp_row,
                             tile.head, tile.batch);
      }
    } else {
      store_elements<T>(p, tile, warp_row, scratch);
    }
    store_lse(p, tile, warp_row, softmax, a.has_offsets);
  }
  if (!broken) return hopper::wait_read_out();  // the launch's end waits for the writes
  // In a loop of its own: what may diverge in a warp costs the other loop its uniform registers.
  hopper::wait_copied_out();
  __syncwarp();
  TileWalk<Config, SageSm90Arguments> again(a);
  while (again.next()) mend_rows<T, Config::kHead>(p, again.tile(), warp_row);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) sage_sm90(const __grid_constant__ SageSm90Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char memory_bytes[];
  const SageSm90Memory<Config> memory{hopper::address_of(memory_bytes)};
  constexpr int kConsumerWarps = 4 * Config::kWarpgroups;
  if (threadIdx.x == 32 && arguments.maps_output) hopper::prefetch(&arguments.out[0]);
  if (threadIdx.x == 0) {
    for (int group = 0; group < Config::kWarpgroups; ++group) {
      hopper::init_barrier(memory.query_full(group), 1);
      hopper::init_barrier(memory.query_empty(group), 128);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      hopper::init_barrier(memory.key_full(stage), 1);
      hopper::init_barrier(memory.value_full(stage), 1);
      hopper::init_barrier(memory.key_empty(stage), kSageKeyGroups * kConsumerWarps);
      hopper::init_barrier(memory.value_empty(stage), kConsumerWarps);
    }
    hopper::fence_barrier_init();
  }
  hopper::start_next_launch();
  __syncthreads();
  if (threadIdx.x < 128) {
    hopper::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x < 32) produce_sage<Config>(arguments, memory);
  } else {
    hopper::take_registers<Config::kConsumerRegisters>();
    consume_sage<Config>(arguments, memory);
  }
}

}  // namespace ditattn::kernels::cuda
