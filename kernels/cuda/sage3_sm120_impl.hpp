#pragma once

/// SAGE_ATTN_3 with products of NVFP4 (compute capability 12.x). Background: SageAttention 3 (arXiv 2505.11594).
/// Approach: a block of four warps, 16 rows each; K and V of the next block of keys are copied to shared memory while
/// one is multiplied. Compiled, never run here but with its instructions emulated, on the CPU
/// (tests/kernels/sage3_fp4_test.cpp) and on other GPUs (tests/cuda/fp4_emulated_impl.hpp). Included by .cu files
/// alone, after fp4_impl.hpp.

#include <utility>

#include "kernels/cuda/flash_sm80_impl.hpp"
#include "kernels/cuda/sage3_fp4.hpp"
#include "kernels/cuda/sage3_softmax_impl.hpp"
#include "kernels/sage3_fp4_layout.hpp"

namespace ditattn::kernels::cuda {

/// Where things lie in shared memory: bytes.
template <class Element, int kHeadSize>
struct Sage3Sm120Config {
  using T = Element;
  static constexpr int kHead = kHeadSize;  // a multiple of 64; channels past the tensor's are zeros
  static constexpr int kKeys = kSage3Keys;
  static constexpr int kThreads = kSage3Fp4Threads;
  static constexpr int kRows = kThreads / 32 * 16;
  static constexpr int kSteps = kHead / fp4::kStep;  // of Q · K
  static constexpr int kValueSteps = kKeys / fp4::kStep;
  static constexpr int kRowBytes = kHead / 2;  // of Q and K
  static constexpr int kRowGroups = kHead / fp4::kGroup;
  static constexpr int kValueBytes = kKeys / 2;  // of a channel of V
  static constexpr int kValueGroups = kKeys / fp4::kGroup;
  static constexpr int kPitch = fp4::pitch(kRowBytes);
  static constexpr int kValuePitch = fp4::pitch(kValueBytes);
  // Of a stage; Q comes before them.
  static constexpr int kKeyGroupsAt = kKeys * kPitch;
  static constexpr int kValueAt = kKeyGroupsAt + kKeys * kRowGroups;
  static constexpr int kValueGroupsAt = kValueAt + kHead * kValuePitch;
  static constexpr int kRecordAt = kValueGroupsAt + kHead * kValueGroups;
  static constexpr int kStageBytes = kRecordAt + 4 * kSage3Record;
  static constexpr int kQueryGroupsAt = kRows * kPitch;
  static constexpr int kStageAt = kQueryGroupsAt + kRows * kRowGroups;
  static constexpr int kSharedBytes = kStageAt + 2 * kStageBytes;
  static_assert(kStageBytes % 16 == 0 && kStageAt % 16 == 0 && kRecordAt % 16 == 0);
};

// Rows of kRowBytes to shared memory, kPitch apart; zeros from `rows` on.
template <int kRowBytes, int kPitch, int kRows>
__device__ __forceinline__ void copy_padded(unsigned to, const void* from, int rows = kRows) {
  constexpr int kPieces = kRowBytes / 16;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kSage3Fp4Threads) {
    const int row = i / kPieces;
    const int piece = i % kPieces * 16;
    const int from_row = row < rows ? row : 0;
    copy_async(to + row * kPitch + piece, static_cast<const char*>(from) + from_row * kRowBytes + piece,
               row < rows ? 16 : 0);
  }
}

template <int... kIndices, class Body>
__device__ __forceinline__ void for_indices(std::integer_sequence<int, kIndices...>, const Body& body) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}

// sums += the first operand's 16 rows · kColumns columns of the second, over kSteps steps.
template <int kColumns, int kSteps, int kPitch, int kGroups>
__device__ __forceinline__ void multiply_all(float (&sums)[kColumns / 2], const std::uint32_t (&rows)[kSteps][4],
                                             std::uint32_t row_scales, unsigned columns, unsigned column_groups) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for_indices(std::make_integer_sequence<int, kSteps>{}, [&](auto step) {
#pragma unroll
    for (int n = 0; n < kColumns; n += 32) {
      const std::uint32_t scales =
          load_word(column_groups + (n + fp4::scale_column_of(lane)) * kGroups + 4 * decltype(step)::value);
      for_indices(std::make_integer_sequence<int, 2>{}, [&](auto half) {
        constexpr int kHalf = decltype(half)::value;
        std::uint32_t b[4];
        load_matrices<false>(columns + fp4::second_operand_at(lane, n + 16 * kHalf, decltype(step)::value, kPitch), b);
        multiply_fp4<decltype(step)::value, 2 * kHalf>(sums + n / 2 + 8 * kHalf, rows[decltype(step)::value], b,
                                                       row_scales, scales);
        multiply_fp4<decltype(step)::value, 2 * kHalf + 1>(sums + n / 2 + 8 * kHalf + 4, rows[decltype(step)::value],
                                                           b + 2, row_scales, scales);
      });
    }
  });
}

/// That of products of NVFP4: a thread has eight numbers of each of four groups of a row, a neighbour the others.
struct Sage3Fp4Softmax : Sage3Rows {
  static constexpr int kSteps = kSage3Keys / fp4::kStep;

  /// Logits, in the order of the sums, to codes, as the second product's first operand, and their scales.
  __device__ __forceinline__ void soften(const float (&x)[kSage3Logits], float (&rescale)[2],
                                         std::uint32_t (&codes)[kSteps][4], std::uint32_t& scales) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float group_scale[2][kSteps][2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float of_group[kSteps][2];
      float most = -INFINITY;
#pragma unroll
      for (int g = 0; g < 2 * kSteps; ++g) {
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < fp4::kRegisterCodes; ++i) {
          largest = fmaxf(largest, x[fp4::probability_sum(row, g / 2, g % 2, i)]);
        }
        largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, 1));
        of_group[g / 2][g % 2] = largest;
        most = fmaxf(most, largest);
      }
      most = fmaxf(most, __shfl_xor_sync(kWarp, most, 2));
      const float subtract = move_reference(row, most, rescale[row]);
      float total = 0;
#pragma unroll
      for (int g = 0; g < 2 * kSteps; ++g) {
        const ProbabilityGroup group(of_group[g / 2][g % 2] - subtract);
        group_scale[row][g / 2][g % 2] = group.scale;
        float numbers[fp4::kRegisterCodes];
#pragma unroll
        for (int i = 0; i < fp4::kRegisterCodes; ++i) {
          const float p = exp2_unit(x[fp4::probability_sum(row, g / 2, g % 2, i)] - subtract);
          total += p;
          numbers[i] = p * group.inverse;
        }
        codes[g / 2][2 * (g % 2) + row] = to_e2m1(numbers);
      }
      sum[row] = fmaf(sum[row], rescale[row], total);
    }
    // A thread's word is of one row and one step; it has two of its bytes, the thread two further has the others.
    const bool lower = fp4::scale_row_of(lane) >= 8;
    const bool second = fp4::scale_step_of(lane) == 1;
    const auto of_step = [&](bool last) {
      float pair[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float upper_scale = last ? group_scale[0][1][half] : group_scale[0][0][half];
        const float lower_scale = last ? group_scale[1][1][half] : group_scale[1][0][half];
        pair[half] = lower ? lower_scale : upper_scale;
      }
      return e4m3_codes(pair[0], pair[1]);
    };
    const std::uint32_t own = of_step(second);
    const std::uint32_t other = __shfl_xor_sync(kWarp, of_step(!second), 2);
    scales = __byte_perm(second ? other : own, second ? own : other, 0x5140);
  }
};

// Sums to logits, of the keys that each number of P is of; −∞ where they are hidden.
template <class Config>
__device__ __forceinline__ void find_fp4_logits(const Sage3Fp4Arguments& a, const Tile& tile, int warp_row, int segment,
                                                int first_key, bool hides, const float (&scale)[2], unsigned record,
                                                float (&x)[kSage3Logits]) {
  const AttentionProblem& p = a.problem;
  const int lane = static_cast<int>(threadIdx.x % 32);
  RowLimits limits;
  const std::uint32_t* bits = nullptr;
  if (hides) {
    limits.find(p, p.key_segments[segment], tile, warp_row);
    const int block = (segment == 1 ? a.images.key_blocks[0] : 0) + first_key / kSage3Keys;
    if (p.key_segments[segment].mask.data != nullptr) {
      bits = a.images.key_bits + (static_cast<std::size_t>(tile.batch) * a.images.blocks() + block) * (kSage3Keys / 32);
    }
  }
#pragma unroll
  for (int g = 0; g < 2 * Config::kValueSteps; ++g) {
    const int first = fp4::probability_key(lane, g / 2, g % 2, 0);
    const std::uint32_t seen = bits == nullptr ? 0xFFFFFFFF : bits[first / 32] >> first % 32;
#pragma unroll
    for (int i = 0; i < fp4::kRegisterCodes; ++i) {
      const float add = load_float(record + 4 * (first + i));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& logit = x[fp4::probability_sum(row, g / 2, g % 2, i)];
        logit = fmaf(logit, scale[row], add);
        const int key = first_key + first + i;
        if (hides && (key < limits.keys[row].x || key >= limits.keys[row].y || (seen >> i & 1) == 0)) logit = -INFINITY;
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void attend_sm120(const Sage3Fp4Arguments& a, unsigned memory) {
  using T = typename Config::T;
  const AttentionProblem& p = a.problem;
  const Sage3Images& images = a.images;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const Tile tile = tile_at<Config::kRows>(p, a.order, blockIdx.x);
  const KeyBlocks<Config::kKeys> blocks(p, tile);
  if (blocks.total() == 0) return store_nothing<T>(p, tile, warp_row);

  const auto stage_of = [&](int i) { return memory + Config::kStageAt + i % 2 * Config::kStageBytes; };
  const auto copy_block = [&](int i) {
    const unsigned stage = stage_of(i);
    const int segment = blocks.segment_of(i);
    const std::size_t kv_head = static_cast<std::size_t>(tile.batch) * p.kv_heads + tile.kv_head;
    const std::size_t block =
        kv_head * images.blocks() + (segment == 1 ? images.key_blocks[0] : 0) + blocks.key_of(i) / kSage3Keys;
    constexpr int kBlockBytes = Config::kKeys * Config::kRowBytes;
    constexpr int kBlockGroups = Config::kKeys * Config::kRowGroups;
    copy_padded<Config::kRowBytes, Config::kPitch, Config::kKeys>(
        stage, static_cast<const char*>(images.key) + block * kBlockBytes);
    copy_padded<16, 16, kBlockGroups / 16>(stage + Config::kKeyGroupsAt, images.key_groups + block * kBlockGroups);
    copy_padded<Config::kValueBytes, Config::kValuePitch, Config::kHead>(
        stage + Config::kValueAt, static_cast<const char*>(images.value) + block * kBlockBytes);
    copy_padded<16, 16, kBlockGroups / 16>(stage + Config::kValueGroupsAt, images.value_groups + block * kBlockGroups);
    copy_padded<16, 16, kSage3Record / 4>(stage + Config::kRecordAt,
                                          record_of(p, images, tile, segment, blocks.key_of(i)));
  };
  const std::size_t first_row = (static_cast<std::size_t>(tile.batch) * p.heads + tile.head) * p.rows + tile.first_row;
  copy_padded<Config::kRowBytes, Config::kPitch, Config::kRows>(
      memory, static_cast<const char*>(images.query) + first_row * Config::kRowBytes, tile.rows);
  copy_block(0);
  // Of this lane's row and step, if there is such a step.
  const int group_row = warp_row + fp4::scale_row_of(lane);
  std::uint32_t query_scales = 0;
  if (group_row < tile.rows && fp4::scale_step_of(lane) < Config::kSteps) {
    query_scales = *reinterpret_cast<const std::uint32_t*>(
        images.query_groups + (first_row + group_row) * Config::kRowGroups + 4 * fp4::scale_step_of(lane));
  }
  float query_scale[2];
  read_query_scales(p, images, tile, warp_row, query_scale);
  std::uint32_t query[Config::kSteps][4];

  Sage3Fp4Softmax softmax;
  float out[Config::kHead / 2] = {};
  for (int i = 0; i < blocks.total(); ++i) {
    await_copies();  // the block has come, and nobody reads the one before any more
    if (i + 1 < blocks.total()) copy_block(i + 1);
    const unsigned stage = stage_of(i);
    if (i == 0) {
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        load_matrices<false>(memory + warp_row * Config::kPitch + fp4::first_operand_at(lane, step, Config::kPitch),
                             query[step]);
      }
    }
    float logits[kSage3Logits] = {};
    multiply_all<Config::kKeys, Config::kSteps, Config::kPitch, Config::kRowGroups>(logits, query, query_scales, stage,
                                                                                    stage + Config::kKeyGroupsAt);
    const unsigned record = stage + Config::kRecordAt;
    const float key_scale = load_float(record + 4 * kSage3KeyScale);
    const float scale[2] = {query_scale[0] * key_scale, query_scale[1] * key_scale};
    find_fp4_logits<Config>(a, tile, warp_row, blocks.segment_of(i), blocks.key_of(i), blocks.hides(i), scale, record,
                            logits);
    float rescale[2];
    std::uint32_t codes[Config::kValueSteps][4];
    std::uint32_t scales;
    softmax.soften(logits, rescale, codes, scales);
    const float of_values = softmax.move_value_scale(load_float(record + 4 * kSage3ValueScale));
#pragma unroll
    for (int j = 0; j < Config::kHead / 2; ++j) out[j] *= rescale[j / 2 % 2] * of_values;
    multiply_all<Config::kHead, Config::kValueSteps, Config::kValuePitch, Config::kValueGroups>(
        out, codes, scales, stage + Config::kValueAt, stage + Config::kValueGroupsAt);
  }
  __syncthreads();  // nobody reads a stage any more
  constexpr int kScratch = Config::kHead / 64 * 2048;
  static_assert(4 * kScratch <= 2 * Config::kStageBytes);
  const unsigned scratch = (memory + Config::kStageAt) + threadIdx.x / 32 * kScratch;
  softmax.finish();
  const float factor[2] = {softmax.factor(0), softmax.factor(1)};
  finish_sage3_rows<Config::kHead>(p, images, tile, softmax, factor, out);
  finish_tile<T, Config::kHead>(p, tile, warp_row, scratch, softmax, factor, out, a.aligned_output, a.adds_lse);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) sage3_sm120(const __grid_constant__ Sage3Fp4Arguments arguments) {
  extern __shared__ __align__(128) unsigned char memory[];
  attend_sm120<Config>(arguments, shared_address(memory));
}

}  // namespace ditattn::kernels::cuda
