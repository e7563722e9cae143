#pragma once

/// Tokens of Q, K and V as a block of threads reads them, and their numbers in 8 bits. Included by .cu files alone.

#include <cuda_fp8.h>

#include "kernels/cuda/flash_tile_impl.hpp"

namespace ditattn::kernels::cuda {

constexpr int kSageWarpRows = 16;
constexpr float kMostByte = 127;
constexpr float kMostFp8 = 448;
constexpr float kLeast = 2e-36F;  // below, and above the next, 1 / x cannot be had: such rows are left to exact steps
constexpr float kMost = 8e37F;

// Eight channels of a token.
template <class T>
struct alignas(16) Eight {
  T x[8];
};

template <class T, bool kAligned>
__device__ Eight<T> load_eight(const T* row, int channel, int head_size) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Eight<T>*>(row + channel);
  } else {
    Eight<T> eight{};
    for (int i = 0; i < 8 && channel + i < head_size; ++i) eight.x[i] = row[channel + i];
    return eight;
  }
}

// A warp's 16 of a tile's tokens, or one of `kParts` of those: `kLanes` neighbouring threads have a token, eight
// channels each. Tokens outside [begin, end) are the nearest of those, channels past the tensor's the first: no product
// sees them.
template <class T, int kLanes, bool kAligned, int kParts = 1>
struct WarpTokens {
  using Element = T;
  static constexpr int kCount = kLanes / 2 / kParts;  // of a thread
  Eight<T> eights[kCount];
  bool has_channels = false;

  __device__ static int lane() { return static_cast<int>(threadIdx.x % kLanes); }
  __device__ static int token(int i, int part = 0) {
    return kSageWarpRows * static_cast<int>(threadIdx.x / 32) + 32 / kLanes * (part * kCount + i) +
           static_cast<int>(threadIdx.x % 32) / kLanes;
  }

  WarpTokens() = default;
  __device__ WarpTokens(const T* data, std::int64_t stride, int first, int begin, int end, int head_size, int part = 0)
      : has_channels(8 * lane() < head_size) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = min(max(first + token(i, part), begin), end - 1);
      eights[i] = load_eight<T, kAligned>(data + at * stride, has_channels ? 8 * lane() : 0, head_size);
    }
  }

  // What was widened before is widened again, in place of registers for twice as many bits.
  __device__ void stay_narrow() {
#pragma unroll
    for (Eight<T>& eight : eights) {
      auto& words = reinterpret_cast<uint4&>(eight);
      asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    }
  }
};

// The larger size; NaN if one is.
__device__ __forceinline__ float larger(float largest, float x) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(largest), "f"(fabsf(x)));
  return y;
}

// Two numbers of 16 bits in the order of their sizes, NaN the largest.
__device__ __forceinline__ std::uint32_t size_of(std::uint32_t pair) { return pair & 0x7FFF7FFF; }

template <class T>
__device__ std::uint32_t sizes_of(const Eight<T>& eight) {
  const auto& words = reinterpret_cast<const uint4&>(eight);
  return __vmaxu2(__vmaxu2(size_of(words.x), size_of(words.y)), __vmaxu2(size_of(words.z), size_of(words.w)));
}

// The largest of `kLanes` neighbouring threads.
template <int kLanes>
__device__ std::uint32_t largest_of_lanes(std::uint32_t sizes) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    sizes = __vmaxu2(sizes, __shfl_xor_sync(kWarp, sizes, distance));
  }
  return sizes;
}
template <int kLanes>
__device__ float largest_of_lanes(float largest) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    largest = larger(largest, __shfl_xor_sync(kWarp, largest, distance));
  }
  return largest;
}

template <class T>
__device__ float to_number(std::uint32_t sizes) {
  const auto bits = static_cast<std::uint16_t>(__vmaxu2(sizes, sizes >> 16));
  return widen(reinterpret_cast<const T&>(bits));
}

// What numbers of this size are multiplied with, for the largest to become `most`; 0 where that cannot be.
__device__ __forceinline__ float inverse_of(float largest, float most) {
  return largest > kLeast && largest < kMost ? most * __frcp_rn(largest) : 0;
}
// And by what they get their size again: NaN, which makes rows be computed again, where they cannot.
__device__ __forceinline__ float scale_of(float largest, float most) {
  return largest == 0 || (largest > kLeast && largest < kMost) ? largest * (1 / most) : NAN;
}

// Whole numbers nearest to eight times a factor, rounded once, as bytes: what is added moves them to the lowest bits.
template <class Number>
__device__ uint2 to_bytes(float factor, const Number& number) {
  constexpr float kMove = 12582912;  // 1.5 · 2²³
  std::uint32_t x[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) x[c] = __float_as_uint(fmaf(number(c), factor, kMove));
  const auto join = [&](int c) {
    return __byte_perm(__byte_perm(x[c], x[c + 1], 0x0040), __byte_perm(x[c + 2], x[c + 3], 0x0040), 0x5410);
  };
  return make_uint2(join(0), join(4));
}

// Four numbers from `at` on, as e4m3.
template <class Number>
__device__ std::uint32_t to_e4m3_word(const Number& number, int at) {
  const auto pair = [&](int i) {
    return static_cast<std::uint32_t>(
        __nv_cvt_float2_to_fp8x2(make_float2(number(i), number(i + 1)), __NV_SATFINITE, __NV_E4M3));
  };
  return pair(at) | pair(at + 2) << 16;
}

// Eight numbers of Q or K times a factor: e4m3 or whole.
template <class Number>
__device__ uint2 to_eight(bool is_fp8, float factor, const Number& number) {
  if (!is_fp8) return to_bytes(factor, number);
  const auto scaled = [&](int c) { return number(c) * factor; };
  return make_uint2(to_e4m3_word(scaled, 0), to_e4m3_word(scaled, 4));
}
__device__ __forceinline__ float most_of(bool is_fp8) { return is_fp8 ? kMostFp8 : kMostByte; }

}  // namespace ditattn::kernels::cuda
