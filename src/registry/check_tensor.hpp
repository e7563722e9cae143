#pragma once

#include "core/tensor_extent.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// Checks of one tensor, named `what` in the ValueError.

bool same_device(DLDevice a, DLDevice b);

void check_unit_last_stride(const char* what, const Tensor& tensor);

/// Four dimensions (batch, tokens, heads, head_size): what must hold before sizes are looked at.
void check_rank_4(const char* what, const Tensor& tensor);

/// All that must hold of an input on its own: the one above, a plain dtype, check_extent, a unit last stride.
void check_input(const char* what, const Tensor& tensor);

void check_size(const char* what, const Tensor& tensor, int dimension, const char* name, std::int64_t expected);

}  // namespace ditattn
