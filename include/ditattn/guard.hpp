#pragma once

/// Watches the numbers of a running model: every N-th call of each layer is compared with float64 attention in a few
/// rows, and its whole output is looked through for NaN and infinities.
///
///     Guard guard({.every = 50, .on_failure = GuardAction::replace});  // until the end of the scope
///     run_the_model();
///     std::puts(guard.report().text().c_str());

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/export.hpp"

namespace ditattn {

class ForwardObservation;

/// What follows a check that fails, beside its place in the report and, for a layer's first, a warning in the log.
enum class GuardAction {
  report,   ///< nothing
  raise,    ///< the call throws a RuntimeError, when its output has been written
  replace,  ///< the output is computed again by a safer back end, which also makes the later calls
};

/// Whose later calls a safer back end makes.
enum class GuardScope {
  layer,
  role,  ///< of all layers that have the failing one's role; those without a role are of one
};

/// What a check of one call found.
struct GuardFinding {
  std::string layer = {};    ///< `ImplConfig::prefix`
  std::string role = {};     ///< `ImplConfig::role`
  std::string backend = {};  ///< which computed, also behind a platform's default
  std::string problem = {};  ///< shapes, dtype and device
  std::uint64_t call = 0;    ///< of this layer, counted from 0
  double error = 0;  ///< of the worst row: ‖out − answer‖ / ‖answer‖; infinite where one of the two counts below does
  double bound = 0;               ///< what `error` may be
  std::int64_t batch = 0;         ///< of the worst row
  std::int64_t head = 0;          ///< of the worst row
  std::int64_t query = 0;         ///< of the worst row: its place among the query rows
  std::int64_t non_finite = 0;    ///< elements of the rows compared that are finite in one of output and answer alone
  std::int64_t without_keys = 0;  ///< elements that are not zero in rows that see no key
  std::string action = {};        ///< what was done: empty for nothing

  /// Over the bound, or NaN.
  [[nodiscard]] bool failed() const { return !(error <= bound); }
  /// One line.
  [[nodiscard]] DITATTN_API std::string text() const;
};

/// What is known of one layer.
struct GuardedLayer {
  std::string layer;              ///< `ImplConfig::prefix`
  std::string role;               ///< `ImplConfig::role`
  std::string backend;            ///< which computed the last call that was checked
  std::uint64_t calls = 0;        ///< that have been computed
  std::uint64_t checks = 0;       ///< that were made
  std::uint64_t failures = 0;     ///< of these
  std::uint64_t captured = 0;     ///< due, but not checked: recorded into a CUDA graph
  std::uint64_t not_checked = 0;  ///< due, but not to be checked, `reason` says why
  std::string reason;             ///< of the last that was not checked
  double last_error = 0;          ///< of the last check
  GuardFinding worst;             ///< the check with the largest error / bound
  std::uint64_t non_finite = 0;   ///< elements of all checks
  std::string replaced_by;        ///< the safer back end, empty if there is none
  std::uint64_t replaced_at = 0;  ///< the call from which on it computes
};

/// What is known of all layers that were watched.
struct GuardReport {
  std::vector<GuardedLayer> layers;  ///< worst first

  /// Of all layers.
  [[nodiscard]] DITATTN_API std::uint64_t failures() const;
  /// A table for people.
  [[nodiscard]] DITATTN_API std::string text() const;
  /// An object {"failures": …, "layers": […]}; infinite errors are null.
  [[nodiscard]] DITATTN_API std::string json() const;
};

/// What is checked, how often, and what follows.
struct GuardOptions {
  std::int64_t every = 100;  ///< calls of a layer from check to check, the first call included
  std::int64_t rows = 16;    ///< of the output that are compared
  /// Of the worst row. None: what rounding allows an exact back end, 2e-5 (float32), 2e-3 (float16) or 1.2e-2
  /// (bfloat16), and 2⁻²² of the largest logit. Quantized back ends need one of their own.
  std::optional<double> max_error = std::nullopt;
  GuardAction on_failure = GuardAction::report;  ///< what follows a failed check
  GuardScope scope = GuardScope::layer;          ///< of `replace`
  /// The member that replaces; empty: of the platform's candidates the first that takes the problem.
  std::string safer = {};
  std::vector<std::string> layers = {};  ///< patterns of names ("blocks.*.attn") that are watched; empty: all
  std::vector<std::string> roles = {};   ///< patterns of roles; empty: all
  bool scan = true;                      ///< look through whole outputs; on a GPU that copies them to the host
  std::uint64_t seed = 0;                ///< of the choice of rows
  /// Told of each failed check when everything has been done, in the thread of the call, which gets what it throws.
  std::function<void(const GuardFinding&)> on_event = {};
};

/// Watches all calls of `AttentionImpl::forward` in the process while it lives. Layers are told apart by name and role,
/// and where they have neither by back end and sizes.
///
/// A check waits for the call's stream and copies the K and V of the rows' heads to the host. Calls that are captured
/// into a CUDA graph are left alone, and a graph that is replayed is no call. What cannot be checked (a dtype, a
/// device, a full memory) does not fail: the report counts it. Guards may live at the same time; where several replace,
/// the first made does. Thread-safe.
class DITATTN_API Guard {
 public:
  /// ValueError for options that make no sense; UnknownBackendError and ImportError for `safer`.
  explicit Guard(GuardOptions options = {});
  ~Guard();
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  /// What is known now. At any time, by any thread.
  [[nodiscard]] GuardReport report() const;
  /// Ends the watch, and with it replacing; the report stays. By one thread.
  void end();

 private:
  class Watch;
  std::shared_ptr<Watch> watch_;
  std::unique_ptr<ForwardObservation> observation_;
};

}  // namespace ditattn
