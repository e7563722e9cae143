#pragma once

/// What calls of attention have in common.

#include <tvm/ffi/any.h>
#include <tvm/ffi/optional.h>

#include "ditattn/backend.hpp"

namespace ditattn::python {

/// What the caller gave, and new memory for the rest. Where the query is malformed nothing is made: `forward` refuses
/// it.
ForwardOutputs outputs_for(const Tensor& query, const AttentionMetadata& metadata,
                           const tvm::ffi::Optional<Tensor>& out, const tvm::ffi::Optional<Tensor>& lse,
                           bool return_lse);

/// out, and the LSE behind it where it is wanted.
tvm::ffi::Any results_of(const Tensor& out, const ForwardOutputs& outputs, bool return_lse);

}  // namespace ditattn::python
