#include "ditattn/problem.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

// The capability a mask kind needs; null for none.
const char* needed_mask(MaskKind kind) {
  switch (kind) {
    case MaskKind::none:
      return nullptr;
    case MaskKind::padding:
      return "padding";
    case MaskKind::boolean:
      return "bool";
    case MaskKind::additive:
      return "additive";
  }
  return nullptr;
}

std::string names(const std::vector<DLDataType>& dtypes) {
  std::vector<std::string> result;
  result.reserve(dtypes.size());
  for (DLDataType dtype : dtypes) result.push_back(dtype_name(dtype));
  return fmt::format("{}", fmt::join(result, ", "));
}

}  // namespace

const char* mask_kind_name(MaskKind kind) {
  const char* needed = needed_mask(kind);
  return needed != nullptr ? needed : "none";
}

MaskKind parse_mask_kind(std::string_view name) {
  constexpr MaskKind kinds[] = {MaskKind::none, MaskKind::padding, MaskKind::boolean, MaskKind::additive};
  if (const auto* found = std::ranges::find(kinds, name, mask_kind_name); found != std::end(kinds)) return *found;
  std::vector<std::string_view> allowed(std::size(kinds));
  std::ranges::transform(kinds, allowed.begin(), mask_kind_name);
  throw ValueError(fmt::format("mask is '{}'. Valid values are: {}", name, fmt::join(allowed, ", ")));
}

std::string describe(const Problem& problem) {
  const auto& [batch, num_heads, num_kv_heads, seq_q, seq_kv, head_size, dtype, device, mask, causal, lse, packed,
               joint, spans, fp8_kv, alignment] = problem;
  std::string text = fmt::format("B={} H={}", batch, num_heads);
  if (num_kv_heads != num_heads) text += fmt::format(" Hkv={}", num_kv_heads);
  text += fmt::format(" Sq={} Skv={} D={}, {} on {}", seq_q, seq_kv, head_size, dtype_name(dtype), device_name(device));
  if (mask != MaskKind::none) text += fmt::format(", mask {}", mask_kind_name(mask));
  for (const auto& [is_set, name] :
       {std::pair{causal, "causal"}, std::pair{lse, "LSE"}, std::pair{joint, "joint text"},
        std::pair{packed, "packed sequences"}, std::pair{spans, "spans"}, std::pair{fp8_kv, "FP8 K and V"}}) {
    if (is_set) text += fmt::format(", {}", name);
  }
  if (alignment == 0) return text + ", a negative stride";
  return alignment == Problem().alignment ? text : text + fmt::format(", aligned to {} bytes", alignment);
}

bool HeadSizes::contains(std::int64_t head_size) const {
  if (!list.empty()) return std::ranges::find(list, head_size) != list.end();
  return head_size >= min && (max == 0 || head_size <= max) && (multiple <= 1 || head_size % multiple == 0);
}

std::string HeadSizes::describe() const {
  if (any()) return "any";
  if (!list.empty()) return fmt::format("{}", fmt::join(list, ", "));
  const std::string step = multiple <= 1 ? "" : fmt::format(" in multiples of {}", multiple);
  return max == 0 ? fmt::format("from {}{}", min, step) : fmt::format("{} to {}{}", min, max, step);
}

bool Capabilities::has_mask(std::string_view name) const { return std::ranges::find(masks, name) != masks.end(); }

std::string Verdict::text() const { return fmt::format("{}", fmt::join(reasons, "; ")); }

Verdict check_capabilities(const std::string& backend, const Capabilities& can, const Problem& problem) {
  Verdict verdict;
  const auto refuse = [&]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
    verdict.reasons.push_back(backend + " " + fmt::format(format, std::forward<Args>(args)...));
  };
  if (std::ranges::find(can.devices, device_type_name(problem.device)) == can.devices.end()) {
    refuse("does not support device={}. Supported devices: {}.", device_name(problem.device),
           fmt::join(can.devices, ", "));
  }
  if (std::ranges::find(can.dtypes, problem.dtype) == can.dtypes.end()) {
    refuse("does not support dtype={}. Supported dtypes: {}.", dtype_name(problem.dtype), names(can.dtypes));
  }
  if (!can.head_sizes.contains(problem.head_size)) {
    refuse("does not support head_size={}. Supported head sizes: {}.", problem.head_size, can.head_sizes.describe());
  }
  if (const char* mask = needed_mask(problem.mask); mask != nullptr && !can.has_mask(mask)) {
    if (can.masks.empty()) {
      refuse("does not support attn_mask. Select a mask-capable backend.");
    } else {
      refuse("does not support a mask of kind {}. Supported kinds: {}.", mask, fmt::join(can.masks, ", "));
    }
  }
  if (!can.gqa && problem.num_kv_heads != problem.num_heads) {
    refuse("does not support GQA/MQA (q_heads={}, kv_heads={}). Select a GQA-capable backend.", problem.num_heads,
           problem.num_kv_heads);
  }
  if (!can.causal && problem.causal) refuse("does not support causal=True.");
  if (!can.lse && problem.lse) refuse("does not return the log-sum-exp.");
  if (!can.packed && problem.packed) refuse("does not support packed sequences (cu_seqlens).");
  if (!can.joint && problem.joint) refuse("does not support joint text tokens (joint_query, joint_key, joint_value).");
  if (can.alignment > 1 && problem.alignment < can.alignment) {
    refuse("needs tensors that start at and have strides of multiples of {} bytes, got {}. Make them contiguous.",
           can.alignment,
           problem.alignment == 0 ? "a negative stride" : fmt::format("multiples of {}", problem.alignment));
  }
  if (!can.has_mask("spans") && problem.spans) {
    verdict.reasons.push_back(
        fmt::format("Attention backend '{}' does not support piecewise attention (full_attn_spans without a 4D "
                    "attn_mask). Use a Flash backend (FLASH_ATTN), or provide a 4D attn_mask that encodes the mixed "
                    "causal/full pattern.",
                    backend));
  }
  if (!can.fp8_kv && problem.fp8_kv) {
    verdict.reasons.push_back(
        fmt::format("Attention backend {} does not support kv_cache_dtype='fp8' on {}. Select a "
                    "compatible backend or set diffusion_kv_cache_dtype='auto'.",
                    backend, device_type_name(problem.device)));
  }
  return verdict;
}

}  // namespace ditattn
