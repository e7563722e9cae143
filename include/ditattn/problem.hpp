#pragma once

/// A problem (what is asked), capabilities (what a backend can do) and the verdict between them.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// What kind of mask a problem has, as far as a backend must care.
enum class MaskKind : std::int32_t {
  none,
  padding,   ///< the same for every head and row: which keys of a batch entry exist
  boolean,   ///< true = attend, varies by row or head
  additive,  ///< added to the logits
};
/// "none", "padding", "bool" or "additive".
DITATTN_API const char* mask_kind_name(MaskKind kind);
/// The kind of that name; ValueError for another.
DITATTN_API MaskKind parse_mask_kind(std::string_view name);

/// One attention problem: query (B, Sq, H, D), key and value (B, Skv, Hkv, D).
struct Problem {
  std::int64_t batch = 1;          ///< B
  std::int64_t num_heads = 1;      ///< H, of query
  std::int64_t num_kv_heads = 1;   ///< Hkv, of key and value; H is a multiple of it
  std::int64_t seq_q = 1;          ///< Sq, tokens
  std::int64_t seq_kv = 1;         ///< Skv, tokens
  std::int64_t head_size = 1;      ///< D
  DLDataType dtype = kFloat32;     ///< of query, key, value and output
  DLDevice device = kCpu;          ///< of all tensors
  MaskKind mask = MaskKind::none;  ///< what the metadata's masks come to
  bool causal = false;             ///< aligned as the back end does (`Capabilities::causal_alignment`)
  bool lse = false;                ///< log-sum-exp wanted too
  bool packed = false;             ///< several sequences in one tensor
  bool joint = false;              ///< text tokens in tensors of their own; seq_q and seq_kv count them
  bool spans = false;              ///< full_attn_spans
  bool fp8_kv = false;             ///< kv_cache_dtype = "fp8"
  /// Bytes, 16 at most, of which every tensor's first element and strides are multiples; 0: some stride is negative.
  std::int64_t alignment = 16;
};
/// For people: "B=1 H=24 Hkv=8 Sq=512 Skv=77 D=64, bfloat16 on cpu, mask padding, causal". What is as by default is
/// left out.
DITATTN_API std::string describe(const Problem& problem);

/// Where causal's diagonal ends when Sq ≠ Skv: row i sees keys j ≤ i (top_left, PyTorch's rule) or
/// j ≤ i + Skv − Sq (bottom_right, FlashAttention's).
enum class CausalAlignment : std::int32_t { top_left, bottom_right };

/// Head sizes a backend takes: a list, a range with a step, or any.
struct HeadSizes {
  std::vector<std::int64_t> list;  ///< if not empty: these only
  std::int64_t min = 1;            ///< otherwise min…max in steps of `multiple`
  std::int64_t max = 0;            ///< 0: no limit
  std::int64_t multiple = 1;       ///< sizes are multiples of it; below 1: as 1

  /// Nothing is excluded.
  [[nodiscard]] bool any() const { return list.empty() && min <= 1 && max == 0 && multiple <= 1; }
  /// This size is taken.
  [[nodiscard]] DITATTN_API bool contains(std::int64_t head_size) const;
  /// "any", "64, 128, 256" or "8 to 256 in multiples of 8".
  [[nodiscard]] DITATTN_API std::string describe() const;
};

/// What a backend declares. Unset lists mean "nothing".
struct Capabilities {
  std::string engine;                ///< what really computes, e.g. "own kernels, AVX-512"
  std::vector<std::string> devices;  ///< "cpu", "cuda"
  std::vector<DLDataType> dtypes;    ///< of query, key, value and output
  HeadSizes head_sizes;              ///< D
  std::vector<std::string> masks;    ///< of "padding", "bool", "additive", "spans"
  bool gqa = false;                  ///< fewer K/V heads than query heads
  bool causal = false;               ///< takes `ImplConfig::causal`
  CausalAlignment causal_alignment = CausalAlignment::bottom_right;  ///< where Sq ≠ Skv
  bool lse = false;                                                  ///< gives the log-sum-exp
  bool packed = false;                                               ///< several sequences in one tensor (cu_seqlens)
  bool joint = false;                                                ///< joint text tokens
  bool fp8_kv = false;                 ///< K and V computed in FP8 on request (kv_cache_dtype)
  bool graph_safe = false;             ///< may be captured in a device graph once warmed up
  bool masked_nan_propagates = false;  ///< NaN or Inf in masked positions shows in the output
  std::int64_t alignment = 1;          ///< bytes: the least `Problem::alignment`; 1: any, negative strides too

  /// `name` is in `masks`.
  [[nodiscard]] DITATTN_API bool has_mask(std::string_view name) const;
};

/// Yes, or every reason against, each with its values.
struct Verdict {
  std::vector<std::string> reasons;                           ///< against; empty: yes
  explicit operator bool() const { return reasons.empty(); }  ///< yes
  /// Reasons joined by "; ".
  [[nodiscard]] DITATTN_API std::string text() const;
};

/// Compares a problem with capabilities; `backend` is named in the reasons. The default of
/// `AttentionBackend::explain`.
DITATTN_API Verdict check_capabilities(const std::string& backend, const Capabilities& can, const Problem& problem);

}  // namespace ditattn
