#pragma once

/// cuDNN's fused attention as plans that are built once and run many times. The one unit behind this header knows
/// cuDNN; all else knows numbers and pointers.

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/fp8_tensors.hpp"

namespace ditattn::cudnn {

/// The library, opened at the first call: its version, 91900 for 9.19; 0 where it cannot be opened.
std::int64_t version();
/// Why it cannot be; empty if it can.
const std::string& problem();

/// All that a plan depends on. Strides of batch, tokens and heads in elements; the head dimension's is 1.
struct SdpaSpec {
  int device = 0;
  int compute_capability = 0;
  bool bfloat16 = false;  ///< float16 otherwise
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t rows = 0;
  std::int64_t keys = 0;
  std::int64_t head_size = 0;
  std::array<std::int64_t, 3> query_strides = {};
  std::array<std::int64_t, 3> key_strides = {};
  std::array<std::int64_t, 3> value_strides = {};
  std::array<std::int64_t, 3> out_strides = {};
  std::uint32_t scale_bits = 0;  ///< of the float32 factor of the logits
  bool causal = false;           ///< row i sees keys j ≤ i
  bool lengths = false;          ///< int32 lengths per batch entry
  bool packed = false;           ///< batch entries are where offsets say: their strides are not looked at
  bool lse = false;
  std::int64_t bias_batch = 0;  ///< 0: no bias. Else (batch, heads, rows, keys) is added, 1 for all
  std::int64_t bias_heads = 0;
  std::array<std::int64_t, 3> bias_strides = {};
  bool bias_float32 = false;  ///< the inputs' type otherwise
  /// Q, K and V are e4m3, no matter what `bfloat16` says. There is no bias then.
  bool fp8 = false;
  bool fp8_out = false;   ///< with fp8: the output too, which alone 9.0 takes
  bool autotune = false;  ///< the first run times cuDNN's candidates, and waits for them

  friend auto operator<=>(const SdpaSpec&, const SdpaSpec&) = default;  // NOLINT: clang-tidy 14 reads a 0 into it
};

/// Device memory of one call; what the spec has not is not looked at.
struct SdpaPointers {
  const void* query = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
  void* out = nullptr;
  float* lse = nullptr;  ///< contiguous (batch, heads, rows)
  const void* bias = nullptr;
  const std::int32_t* query_lengths = nullptr;
  const std::int32_t* key_lengths = nullptr;
  kernels::cuda::Fp8Scales* fp8_scales = nullptr;
  const std::int64_t* offsets = nullptr;  ///< batch + 1 for each of query, key, value and out: elements before an entry
  void* workspace = nullptr;
};

class SdpaPlan {
 public:
  virtual ~SdpaPlan() = default;
  [[nodiscard]] virtual std::int64_t workspace_bytes() const = 0;
  /// Queues the work in `stream`. Thread-safe.
  virtual void run(const SdpaPointers& pointers, void* stream) const = 0;
};

/// The plan for `spec`: built by the first caller, which others wait for, and kept (the 256 used last). What cuDNN
/// cannot do is a NotImplementedError with its reason, remembered too. Thread-safe.
std::shared_ptr<const SdpaPlan> sdpa_plan(const SdpaSpec& spec);

}  // namespace ditattn::cudnn
