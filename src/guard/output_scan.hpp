#pragma once

#include <cstdint>
#include <vector>

#include "core/row_reference.hpp"

namespace ditattn {

/// Up to `most` rows of an output (B, Sq, H, D) that have elements that are NaN or infinite, on the CPU or, copied to
/// the host in pieces, on a CUDA device.
std::vector<Row> non_finite_rows(const Tensor& out, std::size_t most);

}  // namespace ditattn
