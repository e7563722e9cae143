#pragma once

/// How Hopper's quantized kernel is cut, what it is given, and what it has in shared memory. Included by .cu files
/// alone.

#include <type_traits>

#include "kernels/cuda/hopper_pipeline_impl.hpp"
#include "kernels/cuda/sage_tile_impl.hpp"
#include "kernels/cuda/wgmma.hpp"

namespace ditattn::kernels::cuda {

/// How the kernel is cut; Element: of the output, Number: of Q and K, std::int8_t or __nv_fp8_e4m3.
template <class Element, class Number, int kHeadSize, int kGroups, int kBlockKeys, int kDepth>
struct SageSm90Config {
  using T = Element;
  using Products = Wgmma<Number, kBlockKeys>;  // Q · Kᵀ
  static constexpr bool kIsFp8 = std::is_same_v<Number, __nv_fp8_e4m3>;
  using Product = std::conditional_t<kIsFp8, float, int>;
  using Limits = std::conditional_t<kIsFp8, Fp8Limits, ByteLimits>;
  static constexpr int kHead = kHeadSize;
  static constexpr int kChannels = sage_channels(kHead);  // of rows of Q and K, zeros at the end
  static constexpr int kWarpgroups = kGroups;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kBlockKeys;
  static constexpr int kStages = kDepth;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kRowBytes = sage_row_bytes(kChannels);
  static constexpr int kSteps = (kHead + 31) / 32;  // of 32 channels
  // Where there is room, Q stays in registers: products read half as much of shared memory.
  static constexpr bool kHoldsQuery = kGroups < 3;
  static constexpr int kQueryRegisters = kHoldsQuery ? 4 * kSteps : 1;
  static constexpr int kQueryBytes = 64 * kChannels;  // of a warpgroup
  static constexpr int kKeyBytes = kKeys * kChannels;
  static constexpr int kValueBytes = kHead * kKeys;
  static constexpr int kOutputBytes = 64 * kHead * 4;  // of a warpgroup: second sums, then the output
  static constexpr int kScaleBytes = 64 * 4;           // of a warpgroup's rows
  static constexpr int kBarriers = 2 * kGroups + 4 * kStages;
  static constexpr int kFlushBlocks = 1024 / kKeys;  // whose products are added up by tensor cores alone
  static constexpr int kSharedBytes = kGroups * (kQueryBytes + kOutputBytes + kScaleBytes) +
                                      kStages * (kKeyBytes + kValueBytes + 4 * kSageKeyGroups) + 8 * kBarriers;
  static constexpr int kProducerRegisters = WarpgroupRegisters<kGroups>::kProducer;
  static constexpr int kConsumerRegisters = WarpgroupRegisters<kGroups>::kConsumer;
  static_assert(kHead % 16 == 0);
  static_assert(kKeys % kSagePanelKeys == 0 && kKeys * kChannels <= 128 * 128);  // what quantizing has room for
  static_assert(kSharedBytes <= 227 * 1024);
};

struct SageSm90Arguments {
  CUtensorMap out[2];
  AttentionProblem problem;
  SageImages images;
  TileOrder order;
  bool differs;      ///< rows of a batch entry see different keys
  bool maps_output;  ///< `out` are maps; else elements are written one by one
  bool has_offsets;  ///< problem.lse has what smoothing K took off
};

/// Where tiles and barriers are in shared memory.
template <class Config>
struct SageSm90Memory {
  hopper::Address base;
  __device__ hopper::Address query(int group) const { return base + group * Config::kQueryBytes; }
  __device__ hopper::Address output(int group) const {
    return query(Config::kWarpgroups) + group * Config::kOutputBytes;
  }
  __device__ hopper::Address key(int stage) const { return output(Config::kWarpgroups) + stage * Config::kKeyBytes; }
  __device__ hopper::Address value(int stage) const { return key(Config::kStages) + stage * Config::kValueBytes; }
  __device__ hopper::Address query_scale(int group) const {
    return value(Config::kStages) + group * Config::kScaleBytes;
  }
  __device__ hopper::Address key_scale(int stage) const {
    return query_scale(Config::kWarpgroups) + stage * 4 * kSageKeyGroups;
  }
  __device__ hopper::Address barrier(int i) const { return key_scale(Config::kStages) + 8 * i; }
  __device__ hopper::Address key_full(int stage) const { return barrier(stage); }
  __device__ hopper::Address key_empty(int stage) const { return barrier(Config::kStages + stage); }
  __device__ hopper::Address value_full(int stage) const { return barrier(2 * Config::kStages + stage); }
  __device__ hopper::Address value_empty(int stage) const { return barrier(3 * Config::kStages + stage); }
  __device__ hopper::Address query_full(int group) const { return barrier(4 * Config::kStages + group); }
  __device__ hopper::Address query_empty(int group) const { return query_full(Config::kWarpgroups + group); }
};

/// The second sums of a thread: 16 bytes of each of a warp's threads lie beside each other.
template <int kCount>
class SecondSums {
 public:
  __device__ explicit SecondSums(hopper::Address of_warp) : address_(of_warp + threadIdx.x % 32 * 16) {}

  /// Adds the first sums, which then start again; what stands here is multiplied with `pending` before.
  __device__ __forceinline__ void add(const float (&sums)[kCount]) {
    if (empty_) {
      hopper::wait_read_out();  // the output of the tile before
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      float x[4] = {};
      if (!empty_) load(j, x);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = fmaf(x[c], pending_[c / 2], sums[4 * j + c]);
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address_ + 512 * j), "f"(x[0]), "f"(x[1]),
                   "f"(x[2]), "f"(x[3])
                   : "memory");
    }
    empty_ = false;
    pending_[0] = pending_[1] = 1;
  }

  __device__ __forceinline__ void multiply(const float (&factor)[2]) {
    pending_[0] *= factor[0];
    pending_[1] *= factor[1];
  }

  /// Adds what stands here to the first sums.
  __device__ __forceinline__ void give(float (&sums)[kCount]) const {
    if (empty_) return;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      float x[4];
      load(j, x);
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[4 * j + c] = fmaf(x[c], pending_[c / 2], sums[4 * j + c]);
    }
  }

 private:
  __device__ __forceinline__ void load(int j, float (&x)[4]) const {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(address_ + 512 * j)
                 : "memory");
  }

  hopper::Address address_;
  bool empty_ = true;
  float pending_[2] = {1, 1};
};

}  // namespace ditattn::kernels::cuda
