#pragma once

// Background: FlashInfer's Hopper kernel takes what it works on from a tile scheduler, and its own schedulers read
// plans that the host wrote. Approach: a scheduler without a plan, whose blocks are (query tile, head, batch entry) or,
// for packed sequences, (query tile of one of them, head), and whose lengths are read where they lie. Rejected:
// FlashInfer's batch scheduler, which needs a plan and its upload for each set of lengths. Included by one generated unit
// per kernel.

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/numeric_types.h>
#include <flashinfer/attention/hopper/default_params.cuh>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

#include "backends/flashinfer_attn/prefill.hpp"
#include "backends/flashinfer_attn/sequence_tiles.cuh"
#include "kernels/cuda/check_impl.hpp"

namespace ditattn::flashinfer_attn {
namespace hopper {

using kernels::AttentionProblem;
using kernels::ElementType;

template <ElementType kType>
using Element = std::conditional_t<kType == ElementType::bfloat16, cutlass::bfloat16_t, cutlass::half_t>;

// What FlashInfer's kernel asks of a tile scheduler.
template <bool kCausal, int kTileRows>
struct Scheduler {
  struct Params {
    int rows, keys;
    const std::int64_t* lengths;
    std::int64_t length_stride, length_offset;
    cutlass::FastDivmod group_size;
    kernels::cuda::Sequences sequences;
  };

  struct WorkTileInfo {
    int tile, head, kv_head, batch, first_row, first_key, rows, keys;
    bool valid;

    CUTLASS_DEVICE bool is_valid(const Params& /*params*/) const { return valid; }
    // Tile, head, K/V head, first row and first key of the entry, its rows, its keys, the entry.
    CUTLASS_DEVICE auto get_block_coord(const Params& /*params*/) const {
      return cute::tuple{tile, head, kv_head, first_row, first_key, rows, keys, batch};
    }
  };

  CUTLASS_DEVICE WorkTileInfo get_initial_work(const Params& params) const {
    // Tiles at the end see the most keys: those first.
    const int tile = static_cast<int>(kCausal ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const int kv_head = params.group_size.divide(head);
    if (params.sequences.numbers != nullptr) {
      const SequenceTile work = sequence_tile(params.sequences, /*group=*/1, kTileRows, tile);
      const std::int64_t* numbers = params.sequences.numbers + 4 * work.sequence;
      return {work.tile,
              head,
              kv_head,
              work.sequence,
              static_cast<int>(numbers[0] - params.sequences.rows_before),
              static_cast<int>(numbers[2] - params.sequences.keys_before),
              static_cast<int>(numbers[1]),
              static_cast<int>(numbers[3]),
              work.valid};
    }
    const int batch = static_cast<int>(blockIdx.z);
    int keys = params.keys;
    if (params.lengths != nullptr) {
      const std::int64_t length = params.lengths[batch * params.length_stride] - params.length_offset;
      keys = static_cast<int>(length < 0 ? 0 : length < keys ? length : keys);
    }
    return {tile, head, kv_head, batch, batch * params.rows, batch * params.keys, params.rows, keys, true};
  }
  CUTLASS_DEVICE void init_consumer() const {}
  CUTLASS_DEVICE void prefetch_next_work(const Params& /*params*/, WorkTileInfo& /*work*/) const {}
  CUTLASS_DEVICE void broadcast_next_work(WorkTileInfo& /*work*/) const {}
  template <bool kIsProducer = false>
  CUTLASS_DEVICE WorkTileInfo get_next_work(const Params& /*params*/, const WorkTileInfo& /*work*/) const {
    return {0, 0, 0, 0, 0, 0, 0, 0, false};
  }
};

}  // namespace hopper

template <std::int64_t kHeadSize, kernels::ElementType kType, Masking kMasking>
void hopper_prefill(const kernels::AttentionProblem& p, const PrefillMemory& memory,
                    const kernels::cuda::Launch& launch) {
  using kernels::cuda::check;
  using T = hopper::Element<kType>;
  constexpr bool kCausal = kMasking == Masking::causal;
  constexpr auto kTile = flashinfer::getCTATileSize<kHeadSize, kHeadSize, kCausal>();
  using Additional = typename flashinfer::SinglePrefillParams<T, T, T>::AdditionalParams;
  using Traits = flashinfer::AttentionKernelTraits</*USE_TMA_LOAD_KV=*/true, kHeadSize, kHeadSize, std::get<0>(kTile),
                                                   std::get<1>(kTile), /*NUM_STAGES=*/2, T, T, T, std::int32_t,
                                                   flashinfer::DefaultAttention</*use_logits_soft_cap=*/false>>;
  using Mainloop = flashinfer::CollectiveMainloop<Additional, Traits, kCausal>;
  using Epilogue = flashinfer::CollectiveEpilogue<Traits>;
  using Scheduler = hopper::Scheduler<kCausal, Traits::CTA_Q>;

  const kernels::KeySegment& keys = p.key_segments[0];
  const auto layout = [](std::int64_t tokens, std::int64_t heads, const kernels::Strides& strides) {
    return flashinfer::get_gmem_layout(static_cast<int>(tokens), static_cast<int>(heads), kHeadSize, strides.token,
                                       strides.head);
  };
  Additional additional{};
  additional.sm_scale = p.scale;
  const std::int64_t all_rows = p.batch * p.rows;
  const std::int64_t all_keys = p.batch * p.keys;
  auto mainloop = Mainloop::to_underlying_arguments(
      {static_cast<const T*>(p.queries[0].data), layout(all_rows, p.heads, p.queries[0].strides),
       static_cast<const T*>(keys.key), layout(all_keys, p.kv_heads, keys.key_strides),
       static_cast<const T*>(keys.value), layout(all_keys, p.kv_heads, keys.value_strides), /*window_left=*/-1,
       additional});
  auto epilogue = Epilogue::to_underlying_arguments(
      {static_cast<T*>(memory.out), layout(all_rows, p.heads, memory.out_strides), memory.lse,
       flashinfer::get_lse_gmem_layout(static_cast<int>(all_rows), static_cast<int>(p.heads))});
  typename Scheduler::Params scheduler{
      static_cast<int>(p.rows), static_cast<int>(p.keys), keys.lengths,
      keys.length_stride,       keys.length_offset,       cutlass::FastDivmod(static_cast<int>(p.heads / p.kv_heads)),
      memory.sequences};

  const auto* kernel = reinterpret_cast<const void*>(
      flashinfer::PrefillWithKVCacheKernel<Mainloop, Epilogue, Traits, /*LEFT_SLIDING_WINDOW=*/false, kCausal,
                                           Scheduler>);
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "FLASHINFER_ATTN");
  const bool packed = memory.sequences.numbers != nullptr;
  const std::int64_t tiles = packed ? sequence_blocks(memory.sequences, all_rows, /*group=*/1, Traits::CTA_Q)
                                    : (p.rows + Traits::CTA_Q - 1) / Traits::CTA_Q;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.heads),
                  packed ? 1 : static_cast<unsigned>(p.batch));
  void* arguments[] = {&mainloop, &epilogue, &scheduler};
  check(cudaLaunchKernel(kernel, grid, dim3(Traits::NUM_THREADS), arguments, kSharedBytes,
                         static_cast<cudaStream_t>(launch.stream)),
        "FLASHINFER_ATTN");
}

}  // namespace ditattn::flashinfer_attn
