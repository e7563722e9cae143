#pragma once

/// Groups of NVFP4, and how images hold them. Included by .cu files alone.

#include "kernels/cuda/flash_rows_impl.hpp"
#include "kernels/cuda/nvfp4_impl.hpp"
#include "kernels/cuda/sage3_images.hpp"
#include "kernels/sage3_fp4_layout.hpp"

namespace ditattn::kernels::cuda {
namespace {

__device__ __forceinline__ float scale_of(float largest) {
  return largest > kSage3LeastNumber ? largest / kSage3ProbabilityMost : 0;
}

// A group's scale, and its numbers: nvfp4_number's results, in fewer steps, for what is finite.
struct Sage3Group {
  float scale;
  float inverse;

  __device__ __forceinline__ Sage3Group(float largest, float tensor_scale)
      : scale(tensor_scale == 0 ? 0 : round_to_e4m3(fminf(largest / E2m1::kMost / tensor_scale, E4m3::kMost))),
        inverse(scale == 0 ? 0 : 1 / (scale * tensor_scale)) {}
  __device__ __forceinline__ float number(float x) const {
    const float y = x * inverse;
    return copysignf(fminf(round_to_e2m1(fabsf(y)), E2m1::kMost), y);
  }
};

// That of a channel's 16 keys, one of four channels.
__device__ __forceinline__ Sage3Group of_channel(const float (&x)[kNvfp4Group][4], int channel, float scale) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kNvfp4Group; ++i) largest = fmaxf(largest, fabsf(x[i][channel]));
  return {largest, scale};
}

// How images hold numbers: as 16-bit floats, times their groups' scales.
template <class T>
struct Emulated {
  __device__ static int column_of(int key) { return sage3_column_of(key); }
  __device__ static int correction_at(int key) { return sage3_correction_at(key); }

  // Eight channels of a row.
  __device__ __forceinline__ static void store_row(const Sage3Images& images, void* image, std::uint8_t*,
                                                   std::size_t row, int channel, const Sage3Group& group,
                                                   const float (&x)[8]) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pack(group.number(x[2 * i]) * group.scale, group.number(x[2 * i + 1]) * group.scale, T{});
    }
    *reinterpret_cast<uint4*>(static_cast<T*>(image) + row * images.channels + channel) =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }

  // Four channels of V in a group of a block's keys.
  __device__ __forceinline__ static void store_values(const Sage3Images& images, std::size_t block, int channel,
                                                      int key_group, float scale, const float (&x)[kNvfp4Group][4]) {
    T* at = static_cast<T*>(images.value) +
            (block * kSage3Keys + sage3_column_of(key_group * kNvfp4Group)) * images.channels + channel;
    const Sage3Group groups[4] = {of_channel(x, 0, scale), of_channel(x, 1, scale), of_channel(x, 2, scale),
                                  of_channel(x, 3, scale)};
#pragma unroll
    for (int i = 0; i < kNvfp4Group; ++i) {
      float numbers[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) numbers[c] = groups[c].number(x[i][c]) * groups[c].scale;
      *reinterpret_cast<uint2*>(at + sage3_column_of(i) * images.channels) =
          make_uint2(pack(numbers[0], numbers[1], T{}), pack(numbers[2], numbers[3], T{}));
    }
  }
};

// As codes of e2m1 and e4m3, for products of NVFP4.
struct Packed {
  __device__ static int column_of(int key) { return fp4::column_of(key); }
  __device__ static int correction_at(int key) { return key; }

  // Of numbers that the formats have: above its least number with a leading 1, a code is a float's first bits.
  __device__ __forceinline__ static std::uint32_t e2m1_code(float x) {
    const float size = fabsf(x);
    const std::uint32_t code =
        size < 1 ? static_cast<std::uint32_t>(2 * size) : (__float_as_uint(size) >> 22) - 2 * 126;
    return code | (__float_as_uint(x) >> 31) << 3;
  }
  __device__ __forceinline__ static std::uint8_t e4m3_code(float x) {
    return static_cast<std::uint8_t>(x < 1.F / 64 ? static_cast<std::uint32_t>(512 * x)
                                                  : (__float_as_uint(x) >> 20) - 8 * 120);
  }

  __device__ __forceinline__ static void store_row(const Sage3Images& images, void* image, std::uint8_t* scales,
                                                   std::size_t row, int channel, const Sage3Group& group,
                                                   const float (&x)[8]) {
    std::uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) codes |= e2m1_code(group.number(x[i])) << 4 * i;
    *reinterpret_cast<std::uint32_t*>(static_cast<std::uint8_t*>(image) + (row * images.channels + channel) / 2) =
        codes;
    if (channel % kNvfp4Group == 0) scales[(row * images.channels + channel) / kNvfp4Group] = e4m3_code(group.scale);
  }

  __device__ __forceinline__ static void store_values(const Sage3Images& images, std::size_t block, int channel,
                                                      int key_group, float scale, const float (&x)[kNvfp4Group][4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Sage3Group group = of_channel(x, c, scale);
      const std::size_t row = block * images.channels + channel + c;
      std::uint32_t codes[2] = {};
#pragma unroll
      for (int i = 0; i < kNvfp4Group; ++i) codes[i / 8] |= e2m1_code(group.number(x[i][c])) << 4 * (i % 8);
      *reinterpret_cast<uint2*>(static_cast<std::uint8_t*>(images.value) + row * (kSage3Keys / 2) + key_group * 8) =
          make_uint2(codes[0], codes[1]);
      images.value_groups[row * (kSage3Keys / kNvfp4Group) + key_group] = e4m3_code(group.scale);
    }
  }
};

}  // namespace
}  // namespace ditattn::kernels::cuda
