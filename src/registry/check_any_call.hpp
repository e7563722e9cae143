#pragma once

#include "ditattn/backend.hpp"

namespace ditattn {

/// `check_call` without a backend's own implementation: everything that a call's tensors can have wrong for anyone
/// (ValueError), and the problem they pose. `alignment` matters for packed sequences, which it may leave without rows.
DITATTN_API Problem check_any_call(const ImplConfig& config, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const AttentionMetadata& metadata,
                                   CausalAlignment alignment = CausalAlignment::bottom_right);

}  // namespace ditattn
