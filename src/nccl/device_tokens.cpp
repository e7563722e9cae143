// Tokens in a GPU's memory: tensors become what kernels know.

#include "parallel/device_tokens.hpp"

#include <vector>

#include "ditattn/cuda.hpp"
#include "kernels/cuda/token_rows.hpp"
#include "nccl/row_copy.hpp"
#include "parallel/merge.hpp"
#include "parallel/tokens.hpp"

namespace ditattn::parallel {
namespace {

namespace cuda = kernels::cuda;
using kernels::ElementType;
using kernels::Strides;

Strides strides_of(const Tensor& tensor) {
  return {.batch = tensor.stride(0), .token = tensor.stride(1), .head = tensor.stride(2)};
}

cuda::TokenShape shape_of(const Tensor& tensor) {
  return {.batch = tensor.size(0), .tokens = tensor.size(1), .heads = tensor.size(2), .head_size = tensor.size(3)};
}

cuda::Launch launch_on(const Tensor& tensor) {
  return {.device = tensor.device().device_id, .stream = current_stream(tensor.device())};
}

ElementType type_of(const Tensor& tensor) {
  return tensor.dtype() == kFloat32   ? ElementType::float32
         : tensor.dtype() == kFloat16 ? ElementType::float16
                                      : ElementType::bfloat16;
}

cuda::PartRows rows_of(const Tensor& out) {
  cuda::PartRows rows;
  rows.out = data_pointer(out);
  rows.type = type_of(out);
  rows.out_strides = strides_of(out);
  return rows;
}

cuda::PartRows rows_of(const Part& part) {
  cuda::PartRows rows = rows_of(part.out);
  rows.lse = static_cast<float*>(data_pointer(part.lse));
  rows.lse_strides = strides_of(part.lse);
  return rows;
}

void copy_tokens(std::span<const TokenCopy> copies) {
  cuda::copy_rows(row_copies(copies), launch_on(copies.front().to));
}

void merge_tokens(const Part& to, const Part& a, const Part& b) {
  cuda::merge_rows(shape_of(to.out), rows_of(to), rows_of(a), rows_of(b), launch_on(to.out));
}

void clear_tokens(const Part& part) { cuda::clear_rows(shape_of(part.out), rows_of(part), launch_on(part.out)); }

void convert_tokens(const Tensor& to, const Tensor& from) {
  cuda::round_rows(shape_of(to), rows_of(to), rows_of(from), launch_on(to));
}

constexpr DeviceTokens kFunctions = {
    .copy = copy_tokens, .merge = merge_tokens, .clear = clear_tokens, .convert = convert_tokens};

}  // namespace

cuda::RowCopy row_copy(const Tensor& to, const Tensor& from) {
  return {.to = data_pointer(to),
          .from = data_pointer(from),
          .to_strides = strides_of(to),
          .from_strides = strides_of(from),
          .shape = shape_of(to),
          .element_bytes = to.dtype().bits / 8};
}

std::vector<cuda::RowCopy> row_copies(std::span<const TokenCopy> copies) {
  std::vector<cuda::RowCopy> rows;
  for (const auto& [to, from] : copies) {
    if (to.numel() > 0) rows.push_back(row_copy(to, from));
  }
  return rows;
}

}  // namespace ditattn::parallel

const ditattn::parallel::DeviceTokens* ditattn_device_tokens() { return &ditattn::parallel::kFunctions; }
