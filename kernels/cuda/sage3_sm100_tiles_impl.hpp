#pragma once

/// The tiles of SAGE_ATTN_3's kernel for tcgen05: where they are, who fills them, and their products. `Unit` is
/// Tcgen05. Included by .cu files alone.

#include "kernels/cuda/hopper_impl.hpp"
#include "kernels/cuda/mma_impl.hpp"
#include "kernels/cuda/sage3_fp4.hpp"
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
  // Of a stage, of which there are two.
  static constexpr int kKeyGroupsAt = Key::kTileBytes;
  static constexpr int kValueAt = kKeyGroupsAt + Key::kGroupBytes;
  static constexpr int kValueGroupsAt = kValueAt + Value::kTileBytes;
  static constexpr int kRecordAt = kValueGroupsAt + Value::kGroupBytes;
  static constexpr int kStageBytes = kRecordAt + 4 * kSage3Record;
  // Of all; Q comes first.
  static constexpr int kQueryGroupsAt = Query::kTileBytes;
  static constexpr int kProbabilityAt = kQueryGroupsAt + Query::kGroupBytes;
  static constexpr int kProbabilityGroupsAt = kProbabilityAt + Probability::kTileBytes;
  static constexpr int kBarrierAt = kProbabilityGroupsAt + Probability::kGroupBytes;
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

}  // namespace ditattn::kernels::cuda
