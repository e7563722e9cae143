#pragma once

/// SAGE_ATTN_3 with products of NVFP4 by tcgen05 (compute capability 10.x). Background: SageAttention 3 (arXiv
/// 2505.11594). Approach: a block of four warps, 128 rows, a thread for each; two such are on a multiprocessor, so that
/// one's softmax runs under the other's products, and each goes one step after the other. The first warp asks for
/// products of a block of 128 keys; sums are in tensor memory, P and its scales go there by way of shared memory; the
/// output stays in registers, as each block's sums are in other units. K and V of the next block are copied meanwhile.
/// Rejected: softmax and products of one block of threads overlapping, which needs sums, scales and all 512 columns.
/// Compiled, never run here but with its instructions emulated: on the CPU (tests/kernels/sage3_tcgen05_test.cpp) and
/// on other GPUs (tests/cuda/tcgen05_emulated_impl.hpp). Included by .cu files alone, after fp4_impl.hpp.

#include "kernels/cuda/hopper_impl.hpp"
#include "kernels/cuda/mma_impl.hpp"
#include "kernels/cuda/sage3_fp4.hpp"
#include "kernels/cuda/sage3_softmax_impl.hpp"
#include "kernels/sage3_fp4_layout.hpp"
#include "kernels/sage3_tcgen05_layout.hpp"

namespace ditattn::kernels::cuda {

/// Where things lie in shared memory: bytes.
template <class Element, int kHeadSize>
struct Sage3Sm100Config {
  using T = Element;
  static constexpr int kHead = kHeadSize;  // a multiple of 64; channels past the tensor's are zeros
  static constexpr int kKeys = kSage3Keys;
  static constexpr int kRows = tcgen05::kRows;
  using Query = tcgen05::OperandTile<kRows, kHead / 2>;
  using Key = tcgen05::OperandTile<kKeys, kHead / 2>;
  using Probability = tcgen05::OperandTile<kRows, kKeys / 2>;
  using Value = tcgen05::OperandTile<kHead, kKeys / 2>;
  template <class Tile>
  static constexpr int kGroupBytes = Tile::kSteps* tcgen05::kScaleBytes;
  // Of a stage, of which there are two.
  static constexpr int kKeyGroupsAt = Key::kTileBytes;
  static constexpr int kValueAt = kKeyGroupsAt + kGroupBytes<Key>;
  static constexpr int kValueGroupsAt = kValueAt + Value::kTileBytes;
  static constexpr int kRecordAt = kValueGroupsAt + kGroupBytes<Value>;
  static constexpr int kStageBytes = kRecordAt + 4 * kSage3Record;
  // Of all; Q comes first.
  static constexpr int kQueryGroupsAt = Query::kTileBytes;
  static constexpr int kProbabilityAt = kQueryGroupsAt + kGroupBytes<Query>;
  static constexpr int kProbabilityGroupsAt = kProbabilityAt + Probability::kTileBytes;
  static constexpr int kBarrierAt = kProbabilityGroupsAt + kGroupBytes<Probability>;
  static constexpr int kColumnsAt = kBarrierAt + 8;  // the address of columns of tensor memory
  static constexpr int kStageAt = kBarrierAt + 16;
  static constexpr int kSharedBytes = kStageAt + 2 * kStageBytes;
  static_assert(kStageBytes % 16 == 0 && kStageAt % 16 == 0 && kRecordAt % 16 == 0);
};

// A tile to shared memory, of which `rows` exist: zeros below.
template <class Tile>
__device__ __forceinline__ void copy_operand(unsigned to, const void* from, int rows) {
  const int piece = static_cast<int>(threadIdx.x) % Tile::kPieces;
  const int first = static_cast<int>(threadIdx.x) / Tile::kPieces;
  to += Tile::at(first, piece);
  const char* pieces = static_cast<const char*>(from) + first * Tile::kRowBytes + piece * tcgen05::kPiece;
#pragma unroll
  for (int row = 0; row < Tile::kRows; row += kSage3Fp4Threads / Tile::kPieces) {
    const bool exists = first + row < rows;
    copy_async(to + Tile::at(row, 0), exists ? pieces + row * Tile::kRowBytes : from, exists ? 16 : 0);
  }
}

// Its rows' scales, a step's four at a time.
template <class Tile>
__device__ __forceinline__ void copy_groups(unsigned to, const std::uint8_t* from, int rows) {
  const auto row = static_cast<int>(threadIdx.x);
  if (row >= Tile::kRows) return;
  const bool exists = row < rows;
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + tcgen05::scale_at(row, step)),
                 "l"(exists ? from + 4 * (row * Tile::kSteps + step) : from), "r"(exists ? 4 : 0)
                 : "memory");
  }
}

// Before products of what this thread wrote to shared memory, into columns of tensor memory that it has read.
template <class Unit>
__device__ __forceinline__ void hand_over() {
  hopper::fence_copies();
  Unit::fence_before();
  __syncthreads();
}

// After products.
template <class Unit>
__device__ __forceinline__ void await_products(unsigned barrier, int parity) {
  hopper::wait(barrier, parity);
  __syncwarp();
  Unit::fence_after();
}

// Scales of a tile to tensor memory at `columns`; by the first warp, as what follows.
template <class Unit, class Tile>
__device__ __forceinline__ void give_scales(std::uint32_t columns, tcgen05::Operand operand, unsigned groups) {
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    Unit::copy_scales(columns + tcgen05::scale_column(operand, step),
                      tcgen05::describe(groups + step * tcgen05::kScaleBytes, 0));
  }
}

// Sums of A · B at `columns`.
template <class Unit, class A, class B>
__device__ __forceinline__ void multiply_tiles(std::uint32_t columns, unsigned a, tcgen05::Operand of_a, unsigned b,
                                               tcgen05::Operand of_b, unsigned barrier) {
  static_assert(A::kRowBytes == B::kRowBytes);
#pragma unroll
  for (int step = 0; step < A::kSteps; ++step) {
    Unit::multiply(columns, tcgen05::describe(a + A::step_at(step), A::kStride),
                   tcgen05::describe(b + B::step_at(step), B::kStride), tcgen05::instruction(B::kRows),
                   columns + tcgen05::scale_column(of_a, step), columns + tcgen05::scale_column(of_b, step), step > 0);
  }
  Unit::commit(barrier);
}

// What a thread's row sees of a block.
struct SeenOfRow {
  int2 keys = make_int2(0, kSage3Keys);  // of the block
  const std::uint32_t* bits = nullptr;   // of those, where there is a mask

  __device__ __forceinline__ void find(const Sage3Fp4Arguments& a, const Tile& tile, int segment, int first_key) {
    const AttentionProblem& p = a.problem;
    const auto row = static_cast<int>(threadIdx.x);
    const int2 seen =
        row < tile.rows ? keys_of_row(p, p.key_segments[segment], tile.batch, tile.first_row + row) : make_int2(0, 0);
    keys = make_int2(seen.x - first_key, seen.y - first_key);
    if (p.key_segments[segment].mask.data == nullptr) return;
    const int block = (segment == 1 ? a.images.key_blocks[0] : 0) + first_key / kSage3Keys;
    bits = a.images.key_bits + (static_cast<std::size_t>(tile.batch) * a.images.blocks() + block) * (kSage3Keys / 32);
  }
  __device__ __forceinline__ std::uint32_t chunk(int c) const {
    return bits_between(keys, 32 * c) & (bits == nullptr ? 0xFFFFFFFF : bits[c]);
  }
};

/// A thread's row, 32 keys at a time. Sage3Rows' second row is not used.
struct Sage3Sm100Softmax : Sage3Rows {
  static constexpr int kChunk = 32;

  // Logits of a chunk's keys, in their order: the sums are in that of `fp4::key_at`, chunk by chunk.
  template <class Unit>
  __device__ __forceinline__ static void find_logits(std::uint32_t sums, int chunk, float scale, unsigned record,
                                                     const SeenOfRow& sees, float (&x)[kChunk]) {
    float product[kChunk];
    Unit::load(sums + kChunk * chunk, product);
    const std::uint32_t seen = sees.chunk(chunk);
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      const uint4 bits = load_piece(record + 4 * (kChunk * chunk + i));
      const float add[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                            __uint_as_float(bits.w)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float logit = fmaf(product[fp4::column_of(i + c)], scale, add[c]);
        x[i + c] = (seen >> (i + c) & 1) != 0 ? logit : -INFINITY;
      }
    }
  }

  /// Sums of Q · K to P and its scales in shared memory. `rescale` is what sums so far have to be multiplied with, V's
  /// scales aside. Logits are found twice: 128 of them do not fit beside the output.
  template <class Config, class Unit>
  __device__ __forceinline__ void soften(std::uint32_t sums, float scale, unsigned record, const SeenOfRow& sees,
                                         unsigned memory, float& rescale) {
    constexpr int kGroups = kChunk / fp4::kGroup;
    const auto row = static_cast<int>(threadIdx.x);
    float x[kChunk];
    float most = -INFINITY;
#pragma unroll 1
    for (int c = 0; c < kSage3Keys / kChunk; ++c) {
      find_logits<Unit>(sums, c, scale, record, sees, x);
#pragma unroll
      for (const float logit : x) most = fmaxf(most, logit);
    }
    const float subtract = move_reference(0, most, rescale);
    float total = 0;
#pragma unroll 1
    for (int c = 0; c < kSage3Keys / kChunk; ++c) {
      find_logits<Unit>(sums, c, scale, record, sees, x);
      std::uint32_t codes[2 * kGroups];
      float group_scale[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < fp4::kGroup; ++i) largest = fmaxf(largest, x[g * fp4::kGroup + i]);
        const ProbabilityGroup group(largest - subtract);
        group_scale[g] = group.scale;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float numbers[fp4::kRegisterCodes];
#pragma unroll
          for (int i = 0; i < fp4::kRegisterCodes; ++i) {
            const float p = exp2_unit(x[g * fp4::kGroup + half * fp4::kRegisterCodes + i] - subtract);
            total += p;
            numbers[i] = p * group.inverse;
          }
          codes[2 * g + half] = to_e2m1(numbers);
        }
      }
      store_piece(memory + Config::kProbabilityAt + Config::Probability::at(row, c),
                  make_uint4(codes[0], codes[1], codes[2], codes[3]));
      // A step's word is of two chunks.
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(memory + Config::kProbabilityGroupsAt +
                                                   tcgen05::scale_at(row, c / 2) + c % 2 * 2),
                   "h"(static_cast<std::uint16_t>(e4m3_codes(group_scale[0], group_scale[1])))
                   : "memory");
    }
    sum[0] = fmaf(sum[0], rescale, total);
  }
};

// out = out · factor + the sums of P · V.
template <class Unit, int kHead>
__device__ __forceinline__ void add_values(std::uint32_t sums, float factor, float (&out)[kHead]) {
#pragma unroll
  for (int first = 0; first < kHead; first += 32) {
    float product[32];
    Unit::load(sums + first, product);
#pragma unroll
    for (int i = 0; i < 32; ++i) out[first + i] = fmaf(out[first + i], factor, product[i]);
  }
}

// Writes a warp's 32 rows, a thread's each, by way of its own shared memory at `scratch`.
template <class Config>
__device__ __forceinline__ void finish_rows_sm100(const Sage3Fp4Arguments& a, const Tile& tile, unsigned scratch,
                                                  const Sage3Rows& softmax, const float (&out)[Config::kHead]) {
  using T = typename Config::T;
  const AttentionProblem& p = a.problem;
  constexpr int kHalfBytes = Config::kHead / 64 * 2048;  // of 16 rows
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x) - lane;
  const float factors[2] = {softmax.factor(0), 0};
  const bool broken = are_broken(factors, true, out);
  const std::size_t source = static_cast<std::size_t>(p.batch + tile.batch) * p.kv_heads + tile.kv_head;
  const bool sees = softmax.sum[0] != 0;
  const float* mean = a.images.means + source * Config::kHead;
#pragma unroll
  for (int piece = 0; piece < Config::kHead / 8; ++piece) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = 8 * piece + 2 * i;
      const float2 add = *reinterpret_cast<const float2*>(mean + channel);
      pairs[i] = pack(fmaf(out[channel], factors[0], sees ? add.x : 0),
                      fmaf(out[channel + 1], factors[0], sees ? add.y : 0), T{});
    }
    store_piece(scratch + lane / 16 * kHalfBytes + piece_of(lane % 16, piece),
                make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
  if (p.lse != nullptr) store_lse_of(p, tile, warp_row + lane, softmax, 0, a.adds_lse);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    if (a.aligned_output) {
      store_gathered<T, Config::kHead / 8>(p, tile, warp_row + 16 * half, scratch + half * kHalfBytes);
    } else {
      store_elements<T>(p, tile, warp_row + 16 * half, scratch + half * kHalfBytes);
    }
    if (!broken) continue;
    __syncwarp();
    mend_rows<T, Config::kHead>(p, tile, warp_row + 16 * half);
  }
}

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
