#pragma once

/// SAGE_ATTN_3 on Hopper, emulated (docs/kernels/sage3.md): flash_sm90's tiles and products, of NVFP4's numbers times
/// their groups' scales, which 16-bit floats hold exactly; the probabilities are rounded between the products. Included
/// by .cu files alone.

#include <type_traits>

#include "kernels/cuda/flash_sm90_impl.hpp"
#include "kernels/cuda/sage3_softmax_impl.hpp"

namespace ditattn::kernels::cuda {

struct Sage3Sm90Arguments {
  CUtensorMap out[2];
  CUtensorMap query[2];  ///< of the images, as the next
  CUtensorMap key[2];
  CUtensorMap value[2];
  AttentionProblem problem;
  Sage3Images images;
  TileOrder order;
  bool differs;      ///< rows of a batch entry see different keys
  bool maps_output;  ///< else `out` is not used
  bool adds_lse;
};

/// The tiles of flash_sm90, and a record per stage.
template <class Config>
struct Sage3Sm90Memory : FlashSm90Memory<Config> {
  static constexpr int kRecordBytes = 4 * kSage3Record;
  static constexpr int kSharedBytes = Config::kSharedBytes + 16 + Config::kStages * kRecordBytes;
  static_assert(kSharedBytes <= Config::kMostSharedBytes && Config::kKeys == kSage3Keys);
  __device__ hopper::Address record(int stage) const {
    return (this->unused() + 8 + 15) / 16 * 16 + stage * kRecordBytes;
  }
};

__device__ __forceinline__ float4 load_four(hopper::Address address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

template <class Config>
__device__ __forceinline__ void consume_sage3(const Sage3Sm90Arguments& a, const Sage3Sm90Memory<Config>& memory) {
  using T = typename Config::T;
  const AttentionProblem& p = a.problem;
  TileWalk<Config, Sage3Sm90Arguments> tiles(a);
  const int group = static_cast<int>(__shfl_sync(kWarp, threadIdx.x / 128, 0)) - 1;
  const int warp_row = static_cast<int>(threadIdx.x / 32 - 4) * 16;
  const int lane = static_cast<int>(threadIdx.x % 32);
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
    Sage3Softmax softmax;
    float out[Config::kHead / 2];
    float logits[kSage3Logits];
    std::uint32_t probabilities[kSage3Logits / 2];
    float query_scale[2];
    float rescale[2];
    read_query_scales(p, a.images, tile, warp_row, query_scale);
    const hopper::Address query = memory.query(group);

    // What comes after a block's product: its stage of K is given back as soon as it has been read.
    const auto to_probabilities = [&](int i, auto hides) {
      const hopper::Address record = memory.record(key_place.stage);
      const float4 scales = load_four(record + 4 * kSage3KeyScale);
      const float scale[2] = {query_scale[0] * scales.x, query_scale[1] * scales.x};
      Sage3Softmax::to_logits(logits, scale, [&](int four) { return load_four(record + 64 * four + 16 * (lane % 4)); });
      hopper::arrive(memory.key_empty(key_place.stage));  // every thread, as each has read the record
      key_place.advance();
      if constexpr (decltype(hides)::value) {
        hide_sage3_keys(p, a.images, tile, warp_row, blocks.segment_of(i), blocks.key_of(i), logits);
      }
      softmax.soften(logits, rescale);
      const float of_values = softmax.move_value_scale(scales.y);
      rescale[0] *= of_values;
      rescale[1] *= of_values;
    };
    const auto start_values = [&](bool accumulate) {
      hopper::wait(memory.value_full(value_place.stage), value_place.parity);
      hopper::pin(out);
      hopper::pin(probabilities);
      hopper::fence_products();
      multiply_values<Config>(out, probabilities, memory.value(value_place.stage), accumulate);
      hopper::commit_products();
    };
    const auto finish_values = [&] {
      hopper::wait_products<0>();
      hopper::pin(out);
      hopper::pin(probabilities);
      release(memory.value_empty(value_place.stage));
      value_place.advance();
    };
    // Block i's logits, but for the first block's under the output of the block before. No branch while products are
    // unfinished: the compiler would wait for them there.
    const auto attend = [&](int i, auto first, auto hides) {
      constexpr bool overlaps = !decltype(first)::value;
      hopper::wait(memory.key_full(key_place.stage), key_place.parity);
      turns.take();
      hopper::pin(logits);
      hopper::fence_products();
      multiply_keys<Config>(logits, query, memory.key(key_place.stage), false);
      hopper::commit_products();
      if constexpr (overlaps) start_values(i > 1);
      turns.pass();
      hopper::wait_products<overlaps ? 1 : 0>();
      hopper::pin(logits);
      to_probabilities(i, hides);
      if constexpr (overlaps) {
        hopper::hold_waits_for(softmax.sum[0] + softmax.sum[1], memory.unused());
        finish_values();
#pragma unroll
        for (int j = 0; j < Config::kHead / 2; ++j) out[j] *= rescale[j / 2 % 2];
      }
      softmax.pack_numbers<T>(logits, probabilities);
    };
    hopper::wait(memory.query_full(group), query_parity);
    query_parity ^= 1;
    if (blocks.hides(0)) {
      attend(0, std::true_type{}, std::true_type{});
    } else {
      attend(0, std::true_type{}, std::false_type{});
    }
    for (int i = 1; i < total_blocks;) {
      if (blocks.hides(i)) {
        attend(i++, std::false_type{}, std::true_type{});
        continue;
      }
      const int end = blocks.full_end(i);
#pragma unroll 1
      for (; i < end; ++i) attend(i, std::false_type{}, std::false_type{});
    }
    if constexpr (Config::kOutputSlab) release(memory.query_empty(group));
    start_values(total_blocks > 1);
    finish_values();
    softmax.finish();
    const float factor[2] = {softmax.factor(0), softmax.factor(1)};
    finish_sage3_rows<Config::kHead>(p, a.images, tile, softmax, factor, out);
    const float one[2] = {1, 1};
    broken = are_broken(factor, true, out) || broken;
    if constexpr (!Config::kOutputSlab) hopper::sync_named(8 + group, 128);  // all have read Q
    // The output goes by way of shared memory, a warp's rows by themselves: while they are copied, the next tile
    // begins.
    const hopper::Address scratch = memory.output(group) + warp_row % 64 * Config::kPanels * 128;
    hopper::wait_read_out();
    __syncwarp();
    gather_rows<T>(scratch, one, out);
    if (a.maps_output) {
      hopper::fence_copies();
      __syncwarp();
#pragma unroll
      for (int panel = 0; panel < Config::kPanels; ++panel) {
        hopper::copy_box_out(lane == 0, &a.out[tile.segment], scratch + panel * 2048, 64 * panel, tile.row + warp_row,
                             tile.head, tile.batch);
      }
    } else {
      store_elements<T>(p, tile, warp_row, scratch);
    }
    store_lse(p, tile, warp_row, softmax, a.adds_lse);
    if constexpr (!Config::kOutputSlab) {
      hopper::wait_read_out();
      __syncwarp();
      release(memory.query_empty(group));
    }
  }
  if (!broken) return hopper::wait_read_out();  // the launch's end waits for the writes
  hopper::wait_copied_out();
  __syncwarp();
  TileWalk<Config, Sage3Sm90Arguments> again(a);
  while (again.next()) mend_rows<T, Config::kHead>(p, again.tile(), warp_row);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sage3_sm90(const __grid_constant__ Sage3Sm90Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char memory_bytes[];
  const Sage3Sm90Memory<Config> memory{hopper::address_of(memory_bytes)};
  prepare<32>(arguments, static_cast<const FlashSm90Memory<Config>&>(memory));
  hopper::start_next_launch();
  __syncthreads();
  if (threadIdx.x < 128) {
    hopper::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    produce(arguments, memory, [&](const Tile& tile, int segment, int key, int stage) {
      constexpr int bytes = Sage3Sm90Memory<Config>::kRecordBytes;
      hopper::expect_more(memory.key_full(stage), bytes);
      hopper::copy_bytes(memory.record(stage), record_of(arguments.problem, arguments.images, tile, segment, key),
                         bytes, memory.key_full(stage));
    });
  } else {
    hopper::take_registers<Config::kConsumerRegisters>();
    consume_sage3(arguments, memory);
  }
}

}  // namespace ditattn::kernels::cuda
