#pragma once

/// What a thread of SAGE_ATTN_3's kernel for tcgen05 does with its row: logits, P, the output. `Unit` is Tcgen05.
/// Included by .cu files alone, after fp4_impl.hpp.

#include "kernels/cuda/sage3_fp4.hpp"
#include "kernels/cuda/sage3_softmax_impl.hpp"
#include "kernels/sage3_fp4_layout.hpp"
#include "kernels/sage3_tcgen05_layout.hpp"

namespace ditattn::kernels::cuda {

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
    return bits_between(keys.x - 32 * c, keys.y - 32 * c) & (bits == nullptr ? 0xFFFFFFFF : bits[c]);
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

}  // namespace ditattn::kernels::cuda
