#pragma once

#include "ditattn/backend.hpp"

namespace ditattn {

/// Checks the tensors of a forward call against each other and against the implementation's config, before anything
/// is read or written. ValueError says what is wrong, the value and what is allowed. Returns the problem they pose.
Problem check_call(const AttentionImpl& impl, const Tensor& query, const Tensor& key, const Tensor& value,
                   const AttentionMetadata& metadata);

/// The problem that tensors pose which `check_call` has let through.
Problem problem_of(const AttentionImpl& impl, const Tensor& query, const Tensor& key, const Tensor& value,
                   const AttentionMetadata& metadata);

/// Checks what the caller gave to receive results: shapes, dtypes, devices, no overlap with itself or an input.
void check_outputs(const ForwardOutputs& outputs, const Problem& problem, const Tensor& query, const Tensor& key,
                   const Tensor& value, const AttentionMetadata& metadata);

}  // namespace ditattn
