// Writes cases with the oracle's results as safetensors, for torch_check.py: tensors query, key, value, attn_mask (as
// (B, Skv) or with four dimensions), out and lse (float64), one file per case and causal alignment top_left.

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "tests/conformance/options.hpp"

namespace ditattn::conformance {
namespace {

constexpr CausalAlignment kAlignment = CausalAlignment::top_left;  // PyTorch's
constexpr std::int64_t kMaxElements = 1 << 18;                     // keeps the directory small

void copy_elements(const Tensor& from, int dimension, std::int64_t index, const Tensor& to, std::int64_t& next) {
  if (dimension == from.ndim()) {
    store_element(to.data_ptr(), next++, to.dtype(), load_element(from.data_ptr(), index, from.dtype()));
    return;
  }
  for (std::int64_t i = 0; i < from.size(dimension); ++i) {
    copy_elements(from, dimension + 1, index + i * from.stride(dimension), to, next);
  }
}

Tensor contiguous(const Tensor& tensor) {
  Tensor copy = empty({tensor.shape().data(), static_cast<std::size_t>(tensor.ndim())}, tensor.dtype());
  std::int64_t next = 0;
  copy_elements(tensor, 0, 0, copy, next);
  return copy;
}

Tensor to_tensor(std::initializer_list<std::int64_t> shape, const std::vector<double>& values) {
  Tensor tensor = empty(shape, kFloat64);
  std::memcpy(tensor.data_ptr(), values.data(), values.size() * sizeof(double));
  return tensor;
}

void dump(const Case& c, const std::filesystem::path& file) {
  const Inputs in = make_inputs(c, kAlignment, options().seed);
  const reference::Result result =
      reference::attention(in.query, in.key, in.value, in.metadata, c.softmax_scale(), c.causal, kAlignment);
  SafetensorsFile content;
  content.tensors["query"] = contiguous(in.query);
  content.tensors["key"] = contiguous(in.key);
  content.tensors["value"] = contiguous(in.value);
  if (in.metadata.defined()) content.tensors["attn_mask"] = contiguous(in.metadata->fields.attn_mask.value());
  content.tensors["out"] = to_tensor({c.batch, c.heads, c.seq_q, c.head_size}, result.out);
  content.tensors["lse"] = to_tensor({c.batch, c.heads, c.seq_q}, result.lse);
  content.metadata = {
      {"case", c.line}, {"scale", fmt::format("{:.17g}", c.softmax_scale())}, {"causal", c.causal ? "1" : "0"}};
  save_safetensors(file, content);
}

}  // namespace

int dump_cases(const std::string& directory) {
  std::filesystem::create_directories(directory);
  int written = 0;
  for (const char* name : {"pairwise", "shapes", "adversarial"}) {
    for (const Case& c : load_cases(name)) {
      const std::int64_t work = c.batch * c.heads * c.seq_q * c.seq_kv;
      const bool empty_tensor = work == 0;  // nothing to compare
      if (c.nan != NanCase::none || empty_tensor || work > kMaxElements) continue;
      dump(c, std::filesystem::path(directory) / fmt::format("case_{:03}.safetensors", written));
      ++written;
    }
  }
  fmt::print("{} cases written to {}\n", written, directory);
  return 0;
}

}  // namespace ditattn::conformance
