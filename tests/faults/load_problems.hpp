#pragma once

/// Problems of the load test, with what each back end gives when it computes alone.

#include <ditattn/ditattn.hpp>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tests/conformance/random_problem.hpp"

namespace ditattn::faults {

/// An output and its LSE, byte for byte: results depend neither on other calls nor on threads.
struct Result {
  std::string out;
  std::string lse;
  bool operator==(const Result&) const = default;
};

/// Calls `forward(outputs)`, which must use both, with fresh outputs or, without `out`, with the LSE alone.
template <class Forward>
Result result_of(const conformance::Drawn& drawn, bool with_out, const Forward& forward) {
  const std::array lse_shape{drawn.query.size(0), drawn.config.num_heads, drawn.rows};
  const std::array out_shape{drawn.query.size(0), drawn.rows, drawn.config.num_heads, drawn.config.head_size};
  const Tensor lse = empty(lse_shape, kFloat32);
  Tensor out = with_out ? empty(out_shape, drawn.query.dtype()) : Tensor();
  out = forward(ForwardOutputs{.out = out, .lse = lse});
  const auto bytes = [](const Tensor& tensor) {
    return std::string(static_cast<const char*>(data_pointer(tensor)),
                       static_cast<std::size_t>(tensor.numel() * tensor.dtype().bits / 8));
  };
  return {.out = bytes(out), .lse = bytes(lse)};
}

struct LoadProblem {
  conformance::Drawn drawn;
  /// By class path; those that refuse the problem are not in it.
  std::map<std::string, Result> alone;
};

/// Small problems over all metadata. The exact back ends' results are held against the float64 oracle: the first wrong
/// one throws.
std::vector<LoadProblem> load_problems(int count, const std::vector<std::string>& class_paths);

}  // namespace ditattn::faults
