#pragma once

/// SAGE_ATTN_3 with products of NVFP4 by tcgen05 (compute capability 10.0 and 10.3). Background: SageAttention 3 (arXiv
/// 2505.11594). Approach: a block of four warps, 128 rows, a thread for each; two such are on a multiprocessor, so that
/// one's softmax runs under the other's products, and each goes one step after the other. The first warp asks for
/// products of a block of 128 keys; sums are in tensor memory, P and its scales go there by way of shared memory; the
/// output stays in registers, as each block's sums are in other units. K and V of the next block are copied meanwhile.
/// Rejected: softmax and products of one block of threads overlapping, which needs sums, scales and all 512 columns.
/// Compiled, never run here; for tests its instructions are emulated, on the CPU (tests/kernels/sage3_tcgen05_test.cpp)
/// and on Hopper (tests/cuda/tcgen05_emulated_impl.hpp). Included by .cu files alone, after fp4_impl.hpp.

#include "kernels/cuda/sage3_sm100_rows_impl.hpp"
#include "kernels/cuda/sage3_sm100_tiles_impl.hpp"

namespace ditattn::kernels::cuda {

template <class Config, class Unit>
__device__ __forceinline__ void attend_sm100(const Sage3Fp4Arguments& a, unsigned memory) {
  using T = typename Config::T;
  using tcgen05::Operand;
  const AttentionProblem& p = a.problem;
  const Sage3Images& images = a.images;
  const auto row = static_cast<int>(threadIdx.x);
  const int warp = row / 32;
  const Tile tile = tile_at<Config::kRows>(p, a.order, blockIdx.x);
  const KeyBlocks<Config::kKeys> blocks(p, tile);
  if (blocks.total() == 0) {
    store_nothing<T>(p, tile, 32 * warp);
    return store_nothing<T>(p, tile, 32 * warp + 16);
  }

  const auto stage_of = [&](int i) { return memory + Config::kStageAt + i % 2 * Config::kStageBytes; };
  const auto copy_block = [&](int i) {
    const unsigned stage = stage_of(i);
    const int segment = blocks.segment_of(i);
    const std::size_t kv_head = static_cast<std::size_t>(tile.batch) * p.kv_heads + tile.kv_head;
    const std::size_t block =
        kv_head * images.blocks() + (segment == 1 ? images.key_blocks[0] : 0) + blocks.key_of(i) / kSage3Keys;
    constexpr int kBlockBytes = Config::kKeys * Config::kHead / 2;
    constexpr int kBlockGroups = Config::kKeys * Config::kHead / fp4::kGroup;
    copy_operand<typename Config::Key>(stage, static_cast<const char*>(images.key) + block * kBlockBytes,
                                       Config::kKeys);
    copy_groups<typename Config::Key>(stage + Config::kKeyGroupsAt, images.key_groups + block * kBlockGroups,
                                      Config::kKeys);
    copy_operand<typename Config::Value>(stage + Config::kValueAt,
                                         static_cast<const char*>(images.value) + block * kBlockBytes, Config::kHead);
    copy_groups<typename Config::Value>(stage + Config::kValueGroupsAt, images.value_groups + block * kBlockGroups,
                                        Config::kHead);
    if (row < kSage3Record / 4) {
      copy_async(stage + Config::kRecordAt + 16 * row, record_of(p, images, tile, segment, blocks.key_of(i)) + 4 * row,
                 16);
    }
  };
  const unsigned barrier = memory + Config::kBarrierAt;
  if (warp == 0) {
    Unit::template allocate<tcgen05::kColumns>(memory + Config::kColumnsAt);
    if (row == 0) hopper::init_barrier(barrier, 1);
    hopper::fence_barrier_init();
  }
  const std::size_t first_row = (static_cast<std::size_t>(tile.batch) * p.heads + tile.head) * p.rows + tile.first_row;
  copy_operand<typename Config::Query>(
      memory, static_cast<const char*>(images.query) + first_row * Config::Query::kRowBytes, tile.rows);
  copy_groups<typename Config::Query>(memory + Config::kQueryGroupsAt,
                                      images.query_groups + first_row * (Config::kHead / fp4::kGroup), tile.rows);
  copy_block(0);
  const float query_scale = row < tile.rows ? images.query_scale[first_row + row] : 0;

  Sage3Sm100Softmax softmax;
  float out[Config::kHead] = {};
  std::uint32_t columns = 0;
  for (int i = 0; i < blocks.total(); ++i) {
    await_own_copies();
    hand_over<Unit>();  // the block has come, and nobody reads the one before any more
    const unsigned stage = stage_of(i);
    columns = load_word(memory + Config::kColumnsAt);
    const std::uint32_t sums = tcgen05::at_lane(columns, 32 * warp);
    if (warp == 0) {
      Unit::fence_after();
      if (i == 0) {
        give_scales<Unit, typename Config::Query>(columns, Operand::query, memory + Config::kQueryGroupsAt);
      }
      give_scales<Unit, typename Config::Key>(columns, Operand::key, stage + Config::kKeyGroupsAt);
      give_scales<Unit, typename Config::Value>(columns, Operand::value, stage + Config::kValueGroupsAt);
      multiply_tiles<Unit, typename Config::Query, typename Config::Key>(columns, memory, Operand::query, stage,
                                                                         Operand::key, barrier);
    }
    if (i + 1 < blocks.total()) copy_block(i + 1);
    SeenOfRow sees;
    if (blocks.hides(i)) sees.find(a, tile, blocks.segment_of(i), blocks.key_of(i));
    const unsigned record = stage + Config::kRecordAt;
    const float scale = query_scale * load_float(record + 4 * kSage3KeyScale);
    await_products<Unit>(barrier, 0);
    float rescale;
    softmax.template soften<Config, Unit>(sums, scale, record, sees, memory, rescale);
    hand_over<Unit>();
    if (warp == 0) {
      Unit::fence_after();
      give_scales<Unit, typename Config::Probability>(columns, Operand::probability,
                                                      memory + Config::kProbabilityGroupsAt);
      multiply_tiles<Unit, typename Config::Probability, typename Config::Value>(
          columns, memory + Config::kProbabilityAt, Operand::probability, stage + Config::kValueAt, Operand::value,
          barrier);
    }
    await_products<Unit>(barrier, 1);
    const float of_values = softmax.move_value_scale(load_float(record + 4 * kSage3ValueScale));
    add_values<Unit>(sums, rescale * of_values, out);
  }
  Unit::fence_before();
  __syncthreads();  // nobody reads tensor memory or a stage any more
  if (warp == 0) {
    Unit::fence_after();
    Unit::template release<tcgen05::kColumns>(columns);
  }
  constexpr int kScratch = Config::kHead / 64 * 4096;  // of a warp
  static_assert(4 * kScratch <= 2 * Config::kStageBytes);
  finish_rows_sm100<Config>(a, tile, memory + Config::kStageAt + warp * kScratch, softmax, out);
}

template <class Config, class Unit>
__global__ void __launch_bounds__(kSage3Fp4Threads, 2)
    sage3_sm100(const __grid_constant__ Sage3Fp4Arguments arguments) {
  extern __shared__ __align__(128) unsigned char memory[];
  attend_sm100<Config, Unit>(arguments, shared_address(memory));
}

}  // namespace ditattn::kernels::cuda
