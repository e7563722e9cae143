#include "tests/conformance/run_case.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

namespace ditattn::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Largest finite |row| over (batch, token, head).
double largest_norm(const Tensor& t) {
  double largest = 0;
  const std::int64_t head_size = t.size(3);
  const std::int64_t batches = t.stride(0) == 0 ? std::min<std::int64_t>(t.size(0), 1) : t.size(0);
  for (std::int64_t b = 0; b < batches; ++b) {
    for (std::int64_t s = 0; s < t.size(1); ++s) {
      for (std::int64_t h = 0; h < t.size(2); ++h) {
        double sum = 0;
        const std::int64_t row = b * t.stride(0) + s * t.stride(1) + h * t.stride(2);
        for (std::int64_t d = 0; d < head_size; ++d) {
          const double value = load_element(t.data_ptr(), row + d, t.dtype());
          sum += value * value;
        }
        if (std::isfinite(sum)) largest = std::max(largest, sum);
      }
    }
  }
  return std::sqrt(largest);
}

// float32 arithmetic errs with the size of the logits; the 16-bit types by the rounding of the result, unless their
// logits are so large that float32 is what limits them.
double error_bound(const Case& c, double logit_factor) {
  const double float32_bound = 2e-6 * logit_factor;
  if (c.dtype == kFloat32) return float32_bound;
  const bool many = c.batch * c.seq_q * c.heads * c.head_size >= 1000;
  const double rounding = c.dtype == kBFloat16 ? (many ? 2.5e-3 : 4e-3) : (many ? 3.5e-4 : 6e-4);
  return std::max(rounding, float32_bound);
}

// Adds up a comparison, row by row.
struct Comparison {
  Measured& measured;
  double difference = 0;  // squares
  double result = 0;
  double random = 0;
  double scale = 0;

  void fail(const std::string& text) {
    if (measured.wrong.empty()) measured.wrong = text;
  }
  template <class Where>
  void value(double got, double expected, double abs, double of_random_signs, bool empty_row, Where where) {
    if (!std::isfinite(expected)) {
      if (std::isfinite(got)) fail(fmt::format("{} is {}, where the oracle has {}", where(), got, expected));
    } else if (!std::isfinite(got)) {
      fail(fmt::format("{} is {}, where the oracle has {:.6g}", where(), got, expected));
    } else if (empty_row && got != 0) {
      fail(fmt::format("{} is {}, in a row without keys", where(), got));
    } else {
      difference += (got - expected) * (got - expected);
      result += expected * expected;
      random += of_random_signs * of_random_signs;
      scale += abs * abs;
    }
  }
  template <class Where>
  void lse(double got, double expected, Where where) {
    if (std::isfinite(expected) && std::isfinite(got)) {
      measured.lse_error = std::max(measured.lse_error, std::abs(got - expected) / std::max(1., std::abs(expected)));
    } else if (expected == -kInfinity ? got != expected : std::isfinite(expected) || std::isfinite(got)) {
      fail(fmt::format("the LSE of {} is {}, where the oracle has {}", where(), got, expected));
    }
  }
};

}  // namespace

std::vector<NamedBackend> backends_on(DLDevice device) {
  std::vector<NamedBackend> backends;
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    try {
      BackendClass backend = member.get_class();
      backend->validate_available();
      const auto& devices = backend->capabilities().devices;
      if (std::ranges::find(devices, device_type_name(device)) == devices.end()) continue;
      backends.push_back({member.name(), std::move(backend)});
    } catch (const ImportError&) {
      continue;  // not built, or not for this machine
    } catch (const NotRegisteredError&) {
      continue;  // CUSTOM
    }
  }
  return backends;
}

Quantization quantization(const NamedBackend& named, DLDevice device) {
  if (named.member == "SAGE_ATTN_3") return {.in_e2m1 = true};
  if (named.member != "SAGE_ATTN") return {};
  if (device.device_type == kDLCUDA) return {.bytes = 1, .in_e4m3 = true};
  return {.bytes = named.backend->capabilities().engine.find("7 and 8 bits") == std::string::npos ? 1. : 2.};
}

double own_lse_bound(const NamedBackend& named, DLDataType dtype) {
  if (named.member != "FLASHINFER_ATTN") return 0;
  return dtype == kBFloat16 ? 0x1p-9 : 0x1p-12;
}

double quantized_error_bound(const Quantization& quantization, double logits, std::int64_t head_size,
                             double result_share) {
  if (quantization.in_e2m1) return result_share * std::min(0.5 + 2e-3 * logits, 2.0);
  const double of_logits = std::max(6e-4, 3e-3 / std::sqrt(static_cast<double>(head_size)));
  return quantization.bytes * std::min(5e-3 + of_logits * logits, 1.0) + (quantization.in_e4m3 ? 4.5e-2 : 0);
}
double quantized_lse_bound(const Quantization& quantization, double logits) {
  if (quantization.in_e2m1) return 0.1 * logits;
  return quantization.bytes * (1e-4 + 4e-3 * logits);
}

Measured compare(const Case& c, const Inputs& inputs, const reference::Result& expected, const Tensor& out,
                 const Tensor& lse, const Quantization& quantization) {
  Measured measured;
  const double logits = largest_norm(inputs.query) * largest_norm(inputs.key) * std::abs(c.softmax_scale());
  const double logit_factor = std::max(1., logits / 32);
  measured.lse_bound = 1e-5 * logit_factor + quantized_lse_bound(quantization, logits);
  Comparison comparison{.measured = measured};
  std::size_t row = 0;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t h = 0; h < c.heads; ++h) {
      for (std::int64_t i = 0; i < c.seq_q; ++i, ++row) {
        const auto where = [&] { return fmt::format("row (batch {}, head {}, query {})", b, h, i); };
        const bool empty_row = expected.lse[row] == -kInfinity;
        const std::int64_t first = b * out.stride(0) + i * out.stride(1) + h * out.stride(2);
        for (std::int64_t d = 0; d < c.head_size; ++d) {
          const std::size_t at = row * static_cast<std::size_t>(c.head_size) + static_cast<std::size_t>(d);
          const double got = load_element(out.data_ptr(), first + d, c.dtype);
          comparison.value(got, expected.out[at], expected.abs[at], expected.random[at], empty_row, where);
        }
        if (!lse.defined()) continue;
        const std::int64_t index = b * lse.stride(0) + h * lse.stride(1) + i * lse.stride(2);
        comparison.lse(load_element(lse.data_ptr(), index, kFloat32), expected.lse[row], where);
      }
    }
  }
  measured.error = comparison.scale > 0 ? std::sqrt(comparison.difference / comparison.scale)
                                        : (comparison.difference > 0 ? kInfinity : 0);
  const double result_share =
      comparison.scale > 0 ? std::sqrt(std::max(comparison.result, comparison.random) / comparison.scale) : 1;
  measured.bound =
      error_bound(c, logit_factor) + quantized_error_bound(quantization, logits, c.head_size, result_share);
  return measured;
}

void Tally::add(const std::string& backend, const Case& c, Outcome outcome, const Measured& measured) {
  Row& row = rows_[{backend, dtype_name(c.dtype)}];
  ++row.cases;
  if (outcome == Outcome::unsupported) ++row.unsupported;
  if (outcome == Outcome::engines_own) ++row.engines_own;
  if (outcome != Outcome::measured) return;
  row.largest = std::max(row.largest, measured.error);
  if (row.worst.bound == 0 || measured.error / measured.bound > row.worst.error / row.worst.bound) {
    row.worst = measured;
    row.worst_line = c.line;
  }
  if (row.worst_lse.bound == 0 ||
      measured.lse_error / measured.lse_bound > row.worst_lse.lse_error / row.worst_lse.lse_bound) {
    row.worst_lse = measured;
    row.worst_lse_line = c.line;
  }
}

std::string Tally::table() const {
  std::string text =
      fmt::format("{:<16}{:<10}{:>6}{:>13}{:>13}{:>12}{:>12}{:>8}{:>12}{:>8}\n", "backend", "dtype", "cases",
                  "unsupported", "engine's own", "max error", "worst", "bound%", "worst LSE", "bound%");
  std::string lines;
  for (const auto& [key, row] : rows_) {
    const auto share = [](double error, double bound) { return bound > 0 ? 100 * error / bound : 0; };
    text += fmt::format("{:<16}{:<10}{:>6}{:>13}{:>13}{:>12.2e}{:>12.2e}{:>8.1f}{:>12.2e}{:>8.1f}\n", key.first,
                        key.second, row.cases, row.unsupported, row.engines_own, row.largest, row.worst.error,
                        share(row.worst.error, row.worst.bound), row.worst_lse.lse_error,
                        share(row.worst_lse.lse_error, row.worst_lse.lse_bound));
    lines += fmt::format("  {} {}, nearest to its bound: {}\n", key.first, key.second, row.worst_line);
    lines += fmt::format("  {} {}, LSE nearest to its bound: {}\n", key.first, key.second, row.worst_lse_line);
  }
  return text + lines;
}

namespace {

struct Oracle {
  Inputs inputs;
  reference::Result result;
};

// Outputs on `device`, as `outputs` are on the host.
Outputs copy_to(const Outputs& outputs, DLDevice device) {
  if (device.device_type == kDLCPU) return outputs;
  Outputs copy;
  if (outputs.given.out.defined()) {
    copy.out = copy_to(outputs.out, device);
    copy.given.out = copy.out.views.back();
  }
  if (outputs.given.lse.defined()) copy.lse = copy.given.lse = ditattn::copy_to(outputs.given.lse, device);
  return copy;
}

// One run on one backend: the outcome, or what failed.
Tally::Outcome run_on(const Case& c, const NamedBackend& named, DLDevice device, const Oracle& oracle,
                      Measured& measured) {
  Outputs outputs = copy_to(make_outputs(c), device);
  Tensor out;
  try {
    const auto impl = named.backend->make({.num_heads = c.heads,
                                           .head_size = c.head_size,
                                           .softmax_scale = c.scale,
                                           .causal = c.causal,
                                           .num_kv_heads = c.kv_heads});
    const Inputs in = copy_to(oracle.inputs, device);
    out = impl->forward(in.query, in.key, in.value, in.metadata, outputs.given);
    synchronize(device);
  } catch (const Error& error) {
    Problem problem = problem_of(c);
    problem.device = device;
    for (const Tensor& tensor : {oracle.inputs.query, oracle.inputs.key, oracle.inputs.value, outputs.given.out}) {
      if (tensor.defined()) problem.alignment = std::min(problem.alignment, alignment_of(tensor));
    }
    if (!named.backend->explain(problem)) return Tally::Outcome::unsupported;
    // The engines of others refuse scales of 0 and less when a layer is made.
    const bool takes_any_scale = named.member != "CUDNN_ATTN" && named.member != "FLASHINFER_ATTN";
    if (!takes_any_scale && c.softmax_scale() <= 0) return Tally::Outcome::engines_own;
    measured.wrong = fmt::format("explain() says yes, forward() says {}: {}", error.kind(), error.message());
    return Tally::Outcome::measured;
  }
  const bool is_given = !c.out_given || out.data_ptr() == outputs.given.out.data_ptr();
  if (outputs.given.lse.defined()) outputs.given.lse = ditattn::copy_to(outputs.given.lse, kCpu);
  if (c.out_given) outputs.out = copy_to(outputs.out, kCpu);
  measured =
      compare(c, oracle.inputs, oracle.result, c.out_given ? outputs.out.views.back() : ditattn::copy_to(out, kCpu),
              outputs.given.lse, quantization(named, device));
  measured.lse_bound += own_lse_bound(named, c.dtype);
  if (!c.out_given) return Tally::Outcome::measured;
  if (!is_given) measured.wrong = "forward did not return the given out";
  if (const std::int64_t count = count_overwritten(outputs.out); count > 0) {
    measured.wrong = fmt::format("{} elements beside the given out were overwritten", count);
  }
  return Tally::Outcome::measured;
}

}  // namespace

void run_case(const Case& asked, const std::vector<NamedBackend>& backends, DLDevice device, std::uint64_t seed,
              Tally& tally, const std::function<void(const std::string&)>& fail) {
  std::map<std::pair<CausalAlignment, NanCase>, Oracle> oracles;
  for (const NamedBackend& named : backends) {
    const Capabilities& can = named.backend->capabilities();
    Case c = asked;
    if (can.masked_nan_propagates) c.nan = NanCase::none;  // what an engine shows of NaN is its own
    CausalAlignment alignment = can.causal_alignment;
    if (!c.causal || c.seq_q == c.seq_kv) alignment = CausalAlignment::top_left;  // no difference: one oracle
    auto oracle = oracles.find({alignment, c.nan});
    if (oracle == oracles.end()) {
      Inputs inputs = make_inputs(c, alignment, seed);
      reference::Result result = reference::attention(inputs.query, inputs.key, inputs.value, inputs.metadata,
                                                      c.softmax_scale(), c.causal, alignment);
      oracle = oracles.emplace(std::pair{alignment, c.nan}, Oracle{std::move(inputs), std::move(result)}).first;
    }
    Measured measured;
    const Tally::Outcome outcome = run_on(c, named, device, oracle->second, measured);
    tally.add(named.member, c, outcome, measured);
    if (outcome != Tally::Outcome::measured || measured.ok()) continue;
    fail(fmt::format("{} fails [{}]{} with seed {}: error {:.3e} (bound {:.3e}), LSE error {:.3e} (bound {:.3e}){}{}",
                     named.member, c.line, c.nan == asked.nan ? "" : " without its NaN", seed, measured.error,
                     measured.bound, measured.lse_error, measured.lse_bound, measured.wrong.empty() ? "" : "; ",
                     measured.wrong));
  }
}

}  // namespace ditattn::conformance
