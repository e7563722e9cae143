#include "tests/conformance/check_problem.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

namespace ditattn::conformance {

Checked check_problem(const NamedBackend& named, const Drawn& drawn, DLDevice device) {
  SCOPED_TRACE(named.member + ", " + drawn.text);
  const auto impl = named.backend->make(drawn.config);
  Tensor lse = empty(std::array{drawn.query.size(0), drawn.config.num_heads, drawn.rows}, kFloat32, device);
  Tensor out;
  try {
    out = impl->forward(ditattn::copy_to(drawn.query, device), ditattn::copy_to(drawn.key, device),
                        ditattn::copy_to(drawn.value, device), ditattn::copy_to(drawn.metadata, device), {.lse = lse});
    out = ditattn::copy_to(out, kCpu);
    lse = ditattn::copy_to(lse, kCpu);
  } catch (const ValueError& error) {
    return {.refusal = error.message(), .errors = {}, .logits = 0};
  }
  const double scale = impl->softmax_scale();
  const reference::Result expected =
      reference::attention(drawn.query, drawn.key, drawn.value, drawn.metadata, scale, drawn.config.causal,
                           named.backend->capabilities().causal_alignment);
  const Quantization quantized = quantization(named, device);
  const double logits = logit_size(drawn, scale);
  Checked checked{.refusal = {}, .errors = errors_of(out, lse, expected), .logits = logits};
  checked.bound = bound_for(drawn, out, scale) +
                  quantized_error_bound(quantized, logits, drawn.config.head_size, checked.errors.result_share);
  checked.lse_bound = 1e-5 + quantized_lse_bound(quantized, logits) + own_lse_bound(named, drawn.query.dtype());
  return checked;
}

}  // namespace ditattn::conformance
