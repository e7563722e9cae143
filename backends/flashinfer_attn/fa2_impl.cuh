#pragma once

// Background: FlashInfer's ragged prefill kernel reads a plan (which block works on which query tile of which batch
// entry) and takes masks from an attention variant. Approach: the plan is written on the device by a kernel of ours, so
// that no host waits for anything; the variant reads lengths, masks and the diagonal as the problem has them, per head.
// Rejected: FlashInfer's packed bit masks, which are the same for all heads and would be written anew at each call.
// Included by one generated unit per kernel.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/mask.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/scheduler.cuh>
#include <flashinfer/attention/variants.cuh>

#include "backends/flashinfer_attn/fa2_plan.hpp"
#include "backends/flashinfer_attn/prefill.hpp"
#include "kernels/cuda/check_impl.hpp"

namespace ditattn::flashinfer_attn {
namespace fa2 {

using kernels::AttentionProblem;
using kernels::ElementType;

template <ElementType kType>
using Element = std::conditional_t<kType == ElementType::bfloat16, nv_bfloat16, half>;

// FlashInfer's parameters, and ours.
template <typename T>
struct Params : flashinfer::BatchPrefillRaggedParams<T, T, T, std::int32_t> {
  kernels::KeySegment segment;
  std::uint32_t rows, keys;
  bool causal;
  std::int32_t causal_offset;
  kernels::cuda::Sequences sequences;

  __device__ std::uint32_t get_qo_len(std::uint32_t batch) const {
    return sequences.numbers == nullptr ? rows : static_cast<std::uint32_t>(sequences.numbers[4 * batch + 1]);
  }
  __device__ std::uint32_t get_kv_len(std::uint32_t batch) const {
    if (sequences.numbers != nullptr) return static_cast<std::uint32_t>(sequences.numbers[4 * batch + 3]);
    if (segment.lengths == nullptr) return keys;
    const std::int64_t length = segment.lengths[batch * segment.length_stride] - segment.length_offset;
    return length < 0 ? 0 : length < keys ? static_cast<std::uint32_t>(length) : keys;
  }
};

template <bool kCustom>
struct Variant : flashinfer::AttentionVariantBase {
  std::uint32_t qo_len, kv_len, window_left;
  float sm_scale_log2;

  template <typename P>
  __device__ Variant(const P& params, std::uint32_t batch, std::uint8_t* /*shared*/)
      : qo_len(params.get_qo_len(batch)),
        kv_len(params.get_kv_len(batch)),
        window_left(kv_len),
        sm_scale_log2(params.sm_scale * flashinfer::math::log2e) {}

  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    if constexpr (kCustom) {
      if (qo_idx >= qo_len) return false;  // a row of the last tile that is none
      if (params.causal &&
          static_cast<std::int32_t>(kv_idx) > static_cast<std::int32_t>(qo_idx) + params.causal_offset) {
        return false;
      }
      const kernels::Mask& mask = params.segment.mask;
      return mask.data == nullptr ||
             static_cast<const unsigned char*>(
                 mask.data)[batch_idx * mask.strides.batch + qo_head_idx * mask.strides.head +
                            (static_cast<std::int64_t>(qo_idx) - mask.first_row) * mask.strides.token +
                            kv_idx * mask.key_stride] != 0;
    }
    return true;
  })
};

}  // namespace fa2

template <std::int64_t kHeadSize, kernels::ElementType kType, Masking kMasking>
void fa2_prefill(const kernels::AttentionProblem& p, const PrefillMemory& memory, const kernels::cuda::Launch& launch) {
  using T = fa2::Element<kType>;
  using Variant = fa2::Variant<kMasking == Masking::custom>;
  constexpr auto kMode = kMasking == Masking::none     ? flashinfer::MaskMode::kNone
                         : kMasking == Masking::causal ? flashinfer::MaskMode::kCausal
                                                       : flashinfer::MaskMode::kCustom;
  const kernels::KeySegment& keys = p.key_segments[0];
  const std::int64_t group = p.heads / p.kv_heads;
  const std::int64_t rows = memory.sequences.numbers == nullptr ? p.rows : memory.sequences.longest_rows;
  const std::uint32_t tile = flashinfer::FA2DetermineCtaTileQ(rows * group, kHeadSize, kHeadSize, sizeof(T));
  const Fa2Plan plan = write_fa2_plan(p, memory.sequences, tile, memory.plan, launch);

  const auto element = [](const void* data) { return const_cast<T*>(static_cast<const T*>(data)); };
  const auto distance = [](std::int64_t stride) { return static_cast<std::uint32_t>(stride); };
  fa2::Params<T> params;
  params.q = element(p.queries[0].data);
  params.k = element(keys.key);
  params.v = element(keys.value);
  params.o = static_cast<T*>(memory.out);
  params.lse = memory.lse;
  params.group_size = flashinfer::uint_fastdiv(static_cast<std::uint32_t>(group));
  params.num_qo_heads = static_cast<std::uint32_t>(p.heads);
  params.num_kv_heads = static_cast<std::uint32_t>(p.kv_heads);
  params.q_stride_n = distance(p.queries[0].strides.token);
  params.q_stride_h = distance(p.queries[0].strides.head);
  params.k_stride_n = distance(keys.key_strides.token);
  params.k_stride_h = distance(keys.key_strides.head);
  params.v_stride_n = distance(keys.value_strides.token);
  params.v_stride_h = distance(keys.value_strides.head);
  params.window_left = -1;
  params.sm_scale = p.scale;
  params.q_indptr = params.o_indptr = plan.first_rows;
  params.kv_indptr = plan.first_keys;
  params.request_indices = plan.entries;
  params.qo_tile_indices = plan.tiles;
  params.kv_tile_indices = plan.zeros;
  params.kv_chunk_size_ptr = plan.chunk_size;
  params.block_valid_mask = plan.valid;
  params.padded_batch_size = static_cast<std::uint32_t>(plan.blocks);
  params.segment = keys;
  params.rows = static_cast<std::uint32_t>(p.rows);
  params.keys = static_cast<std::uint32_t>(p.keys);
  params.causal = p.causal;
  params.causal_offset = static_cast<std::int32_t>(p.causal_offset);
  params.sequences = memory.sequences;

  const auto run = [&]<std::uint32_t kTile>(std::integral_constant<std::uint32_t, kTile>) {
    return flashinfer::BatchPrefillWithRaggedKVCacheDispatched<kTile, kHeadSize, kHeadSize,
                                                               flashinfer::PosEncodingMode::kNone,
                                                               /*USE_FP16_QK_REDUCTION=*/false, kMode, Variant>(
        params, /*tmp_v=*/nullptr, /*tmp_s=*/nullptr, /*enable_pdl=*/false, static_cast<cudaStream_t>(launch.stream));
  };
  cudaError_t status = cudaErrorInvalidValue;
  if (tile == 16) status = run(std::integral_constant<std::uint32_t, 16>());
  if (tile == 64) status = run(std::integral_constant<std::uint32_t, 64>());
  if constexpr (kHeadSize < 256) {
    if (tile == 128) status = run(std::integral_constant<std::uint32_t, 128>());
  }
  kernels::cuda::check(status, "FLASHINFER_ATTN");
}

}  // namespace ditattn::flashinfer_attn
