#pragma once

#include "ditattn/backend.hpp"

namespace ditattn {

/// Checks what metadata adds to a call, before anything is read or written, and completes `problem` with it. ValueError
/// as in check_call.hpp, with vLLM-Omni's text where it has one.
void check_metadata(const AttentionMetadataObj& metadata, const Tensor& query, const Tensor& key,
                    CausalAlignment alignment, Problem& problem);

}  // namespace ditattn
