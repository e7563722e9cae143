#pragma once

#include <span>
#include <vector>

#include "ditattn/communicator.hpp"
#include "kernels/cuda/token_rows.hpp"

namespace ditattn::parallel {

/// A copy of tokens (parallel/tokens.hpp) as kernels know it.
kernels::cuda::RowCopy row_copy(const Tensor& to, const Tensor& from);
/// Without those of no tokens.
std::vector<kernels::cuda::RowCopy> row_copies(std::span<const TokenCopy> copies);

}  // namespace ditattn::parallel
