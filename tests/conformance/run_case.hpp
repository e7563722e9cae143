#pragma once

/// Runs one case on backends and compares with the oracle.

#include <ditattn/ditattn.hpp>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "backends/reference/reference.hpp"
#include "tests/conformance/case.hpp"
#include "tests/conformance/inputs.hpp"

namespace ditattn::conformance {

struct NamedBackend {
  std::string member;
  BackendClass backend;
};

/// Members of the registry that compute on `device` here, in definition order.
std::vector<NamedBackend> backends_on(DLDevice device);
inline std::vector<NamedBackend> cpu_backends() { return backends_on(kCpu); }

/// Errors of one run, as the project measures them: ‖out − ref‖ / ‖Σ P·|V|‖ over the output.
struct Measured {
  double error = 0;
  double bound = 0;
  double lse_error = 0;  ///< largest |lse − ref| / max(1, |ref|)
  double lse_bound = 0;
  std::string wrong;  ///< what a number does not show: a NaN, a row without keys that is not zero, …

  [[nodiscard]] bool ok() const { return wrong.empty() && error <= bound && lse_error <= lse_bound; }
};

/// How a backend rounds its numbers.
struct Quantization {
  double bytes = 0;      ///< error of Q's and K's against 8 bits': 0 for an exact backend, 1, or 2 where some have 7
  bool in_e4m3 = false;  ///< P and V: three bits after the first, where 8-bit ones have seven
  bool in_e2m1 = false;  ///< all four: one bit after the first, under scales of 16 numbers
};
Quantization quantization(const NamedBackend& named, DLDevice device);

/// Bounds for quantized backends where no logit is larger than `logits`. Rounding Q and K moves a logit by its row's
/// and key's size, not by its own, and more where there are too few channels (below 25) to average it out; a moved
/// logit moves weight from key to key, of all of it at most. Rounding P and V alone costs up to 5e-3 where keys are
/// few, and in e4m3 a sixteenth of each number at most, of all that is summed. e2m1's errors are so large that they are
/// held against the result itself, of which Σ P·|V| is many times the size where many keys are seen: `result_share` is
/// ‖ref‖ / ‖Σ P·|V|‖, or, as few numbers may be near zero by chance, what it is for random signs of V, where that is
/// more. They are 0.2 of the result for random numbers, and more where rows are few numbers or logits so large that
/// another key wins.
double quantized_error_bound(const Quantization& quantization, double logits, std::int64_t head_size,
                             double result_share);
/// The same of the log-sum-exp of a row, which may be one key's logit. Rounding to 8 bits moves that by 8e-4 of
/// `logits` (standard deviation), and the largest of some million rows by five times that.
double quantized_lse_bound(const Quantization& quantization, double logits);

/// What an engine's LSE may be off beside float32's rounding: FlashInfer sums probabilities that are rounded to 16
/// bits.
double own_lse_bound(const NamedBackend& named, DLDataType dtype);

/// Measures `out` and `lse` (null: not compared) against the oracle's rows.
Measured compare(const Case& c, const Inputs& inputs, const reference::Result& expected, const Tensor& out,
                 const Tensor& lse, const Quantization& quantization = {});

/// Totals per backend and dtype.
class Tally {
 public:
  enum class Outcome { measured, unsupported, engines_own };
  void add(const std::string& backend, const Case& c, Outcome outcome, const Measured& measured);
  /// A table: cases, unsupported, worst errors with their bounds' share and the case they came from.
  [[nodiscard]] std::string table() const;

 private:
  struct Row {
    std::int64_t cases = 0;
    std::int64_t unsupported = 0;
    std::int64_t engines_own = 0;
    Measured worst, worst_lse;  // by share of the bound
    std::string worst_line, worst_lse_line;
    double largest = 0;  // error, whatever its bound
  };
  std::map<std::pair<std::string, std::string>, Row> rows_;
};

/// Runs `c` on every backend, on `device`; the oracle runs once per causal alignment. Calls fail(text) with a full
/// description for each failure.
void run_case(const Case& c, const std::vector<NamedBackend>& backends, DLDevice device, std::uint64_t seed,
              Tally& tally, const std::function<void(const std::string&)>& fail);

}  // namespace ditattn::conformance
