#pragma once

// What a timed layer may do beside dense attention, here and in peers/compare.py.

#include <ditattn/ditattn.hpp>

namespace ditattn::bench {

struct Variant {
  const char* name;
  bool causal = false;
  bool padded = false;  // the last quarter of the keys is hidden
};

constexpr Variant kVariants[] = {{"dense"}, {"causal", true}, {"padded", false, true}};

inline std::int64_t visible_keys(const Variant& variant, std::int64_t keys) {
  return variant.padded ? keys - keys / 4 : keys;
}

// Like a model's step: made once, its mask described in the first call.
inline AttentionMetadata metadata_of(const Variant& variant, std::int64_t batch, std::int64_t keys) {
  if (!variant.padded) return {};
  const Tensor mask = empty({batch, keys}, kBool);
  auto* const visible = static_cast<bool*>(mask.data_ptr());
  for (std::int64_t i = 0; i < mask.numel(); ++i) visible[i] = i % keys < visible_keys(variant, keys);
  return AttentionMetadata({.attn_mask = mask});
}

// Whether a member's class does this here. False too where the class is not there.
inline bool can_run(DiffusionAttentionBackendEnum member, const Variant& variant, Problem problem) {
  problem.causal = variant.causal;
  problem.mask = variant.padded ? MaskKind::padding : MaskKind::none;
  try {
    member.get_class()->validate_available();
    return static_cast<bool>(member.get_class()->explain(problem));
  } catch (const Error&) {
    return false;
  }
}

}  // namespace ditattn::bench
