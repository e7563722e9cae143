#pragma once

/// kernels/cuda/tcgen05_impl.hpp on GPUs of compute capability 9.0: the same results but for the order of sums, and
/// done when the call returns. Tensor memory is global memory. What no instruction could be given is a trap. Included
/// by .cu files alone.

#include <cstdint>

#include "kernels/cuda/hopper_impl.hpp"
#include "tests/kernels/tcgen05_emulated.hpp"

namespace ditattn::kernels::cuda {

constexpr int kEmulatedBlocks = 64;
static __device__ std::uint32_t emulated_tensor_memory[kEmulatedBlocks][128][512];

struct EmulatedTcgen05 {
  static constexpr int kFirstColumn = 128;  // of those that are allocated

  struct Shared {
    const std::uint8_t* first;
    [[nodiscard]] constexpr std::uint8_t byte(unsigned at) const { return first[at]; }
  };
  struct Tensor {
    std::uint32_t (*lanes)[512];
    [[nodiscard]] constexpr std::uint32_t& word(int lane, int column) const { return lanes[lane][column]; }
  };
  __device__ static Shared shared() { return {static_cast<const std::uint8_t*>(__cvta_shared_to_generic(0))}; }
  __device__ static Tensor tensor() { return {emulated_tensor_memory[blockIdx.x]}; }
  __device__ static void require(bool holds) {
    if (!holds) __trap();
  }
  __device__ static void require_columns(std::uint32_t address, int count) {
    require(emulated::column_of(address) >= kFirstColumn && emulated::column_of(address) + count <= 512);
  }
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  template <int kColumns>
  __device__ static void allocate(unsigned to) {
    require(blockIdx.x < kEmulatedBlocks && kFirstColumn + kColumns <= 512);
    require((kColumns & (kColumns - 1)) == 0 && kColumns >= 32);
    for (int i = lane(); i < 128 * 512; i += 32) emulated_tensor_memory[blockIdx.x][i / 512][i % 512] = 0x7FFFFFFF;
    if (lane() == 0) asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(kFirstColumn) : "memory");
  }
  template <int kColumns>
  __device__ static void release(std::uint32_t address) {
    require(address == kFirstColumn);
  }

  __device__ static void copy_scales(std::uint32_t to, std::uint64_t from) {
    require(emulated::SharedMatrix(from).is_valid && emulated::lane_of(to) == 0 && to % 4 == 0);
    require_columns(to, 4);
    const Tensor words = tensor();
    emulated::copy_scales(shared(), words, to, from, lane());
    __syncwarp();
  }

  __device__ static void multiply(std::uint32_t sums, std::uint64_t a, std::uint64_t b, std::uint32_t instruction,
                                  std::uint32_t a_scales, std::uint32_t b_scales, bool adds) {
    const emulated::Instruction told(instruction);
    require(told.is_valid && emulated::SharedMatrix(a).is_valid && emulated::SharedMatrix(b).is_valid);
    require(emulated::lane_of(sums | a_scales | b_scales) == 0);
    require_columns(sums, told.columns);
    require_columns(a_scales, 4);
    require_columns(b_scales, 4);
    const Tensor words = tensor();
    for (int i = lane(); i < told.rows * told.columns; i += 32) {
      const int row = i / told.columns;
      const int column = i % told.columns;
      std::uint32_t& word = words.word(row, emulated::column_of(sums) + column);
      const float before = adds ? __uint_as_float(word) : 0;
      word = __float_as_uint(before + emulated::product<float>(shared(), words, a, b, a_scales, b_scales, row, column));
    }
    __syncwarp();
  }

  __device__ static void commit(unsigned barrier) {
    __threadfence_block();
    __syncwarp();
    if (lane() == 0) hopper::arrive(barrier);
  }

  __device__ static void load(std::uint32_t from, float (&x)[32]) {
    require(emulated::lane_of(from) == static_cast<int>(threadIdx.x / 32 % 4 * 32));
    require_columns(from, 32);
    const Tensor words = tensor();
    for (int i = 0; i < 32; ++i) {
      x[i] = __uint_as_float(words.word(emulated::lane_of(from) + lane(), emulated::column_of(from) + i));
    }
  }

  __device__ static void fence_before() {}
  __device__ static void fence_after() {}
};

}  // namespace ditattn::kernels::cuda
