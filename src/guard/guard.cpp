#include "ditattn/guard.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "core/cuda_driver.hpp"
#include "core/interrupt.hpp"
#include "core/row_reference.hpp"
#include "core/text.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "ditattn/observer.hpp"
#include "ditattn/registry.hpp"
#include "guard/layers.hpp"
#include "guard/output_scan.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

constexpr std::size_t kMostNonFiniteRows = 8;  // of those that the scan finds, compared beside the others

// What rounding allows an exact back end. Twice and more what our CPU kernels give at worst, on outliers, offsets, huge
// and tiny numbers, one element per head, and 16,384 keys: 1.2e-5 (float32), 4.7e-4 (float16), 5.3e-3 (bfloat16).
// Logits are float32 everywhere and rounded in proportion to their size, whatever the dtype.
double default_bound(DLDataType dtype, double logit_size) {
  const double rounding = dtype == kBFloat16 ? 1.2e-2 : dtype == kFloat16 ? 2e-3 : 2e-5;
  return rounding + 0x1p-22 * logit_size;
}

void check(GuardOptions& options) {
  if (options.every < 1) throw ValueError(fmt::format("every={} is too small: it must be 1 at least.", options.every));
  if (options.rows < 1) throw ValueError(fmt::format("rows={} is too small: it must be 1 at least.", options.rows));
  if (options.max_error && !(*options.max_error >= 0)) {
    throw ValueError(fmt::format("max_error={} is not a number from 0.", *options.max_error));
  }
  if (options.safer.empty()) return;
  options.safer = upper_case(options.safer);
  DiffusionAttentionBackendEnum::from_name(options.safer).get_class()->validate_available();
}

// Without the backtrace that tvm-ffi's errors show.
std::string text_of(const std::exception& error) {
  const auto* own = dynamic_cast<const tvm::ffi::Error*>(&error);
  return own != nullptr ? own->message() : error.what();
}

}  // namespace

class Guard::Watch final : public ForwardObserver {
 public:
  explicit Watch(GuardOptions options) : options_(std::move(options)), layers_(options_) {}

  const AttentionImpl* instead(const ForwardEvent& event) override;
  void after(const ForwardEvent& event) override;
  [[nodiscard]] GuardReport report() const { return {.layers = layers_.report()}; }

 private:
  struct Place {
    WatchedLayer& layer;
    std::uint64_t call;
  };

  // Compares the call's output as it is now.
  [[nodiscard]] GuardFinding look(const ForwardEvent& event, const AttentionImpl& computed, const Place& place) const;
  void react(const ForwardEvent& event, const Place& place, GuardFinding finding);
  // Whether another back end has made the output right; `action` says who, or why nobody.
  bool replace(const ForwardEvent& event, const Place& place, std::string& action);
  bool try_replacement(const ForwardEvent& event, const Place& place, const BackendClass& backend,
                       std::vector<std::string>& reasons);

  const GuardOptions options_;
  WatchedLayers layers_;
  std::atomic<bool> has_detours_ = false;
};

const AttentionImpl* Guard::Watch::instead(const ForwardEvent& event) {
  if (!has_detours_.load(std::memory_order_acquire)) return nullptr;
  WatchedLayer& layer = layers_.of(event.impl);
  if (!layer.is_watched) return nullptr;
  const BackendClass safer = layer.detour->choose(event);
  if (safer == nullptr || safer->get_name() == event.impl.backend().get_name()) return nullptr;
  const AttentionImpl& replacement = layer.replacement(safer, event.impl);
  layer.set_replaced(safer->get_name(), layer.calls.load(std::memory_order_relaxed));
  return &replacement;
}

void Guard::Watch::after(const ForwardEvent& event) {
  WatchedLayer& layer = layers_.of(event.impl);
  if (!layer.is_watched) return;
  const Place place{.layer = layer, .call = layer.calls.fetch_add(1, std::memory_order_relaxed)};
  if (place.call % static_cast<std::uint64_t>(options_.every) != 0) return;
  if (cuda::is_captured(event.problem.device)) {
    ++layer.captured;
    return;
  }
  GuardFinding finding;
  try {
    finding = look(event, *event.computed, place);
  } catch (const std::exception& error) {  // a guard that cannot look must not fail the model
    return layer.add_not_checked(text_of(error));
  }
  if (finding.failed()) return react(event, place, std::move(finding));
  layer.add(finding);
}

GuardFinding Guard::Watch::look(const ForwardEvent& event, const AttentionImpl& computed, const Place& place) const {
  std::vector<Row> rows = sample_rows(event.problem, options_.rows, options_.seed + place.call);
  if (options_.scan) {
    for (const Row& row : non_finite_rows(event.call.out, kMostNonFiniteRows)) {
      if (std::ranges::find(rows, row) == rows.end()) rows.push_back(row);
    }
  }
  const RowErrors errors = check_rows(event.call, event.impl.softmax_scale(), event.impl.config().causal,
                                      event.impl.backend().capabilities().causal_alignment, rows);
  return {.layer = place.layer.name,
          .role = place.layer.role,
          .backend = computed.backend().get_name(),
          .problem = describe(event.problem),
          .call = place.call,
          .error = errors.worst_row,
          .bound = options_.max_error.value_or(default_bound(event.call.out.dtype(), errors.logit_size)),
          .batch = errors.worst.batch,
          .head = errors.worst.head,
          .query = errors.worst.query,
          .non_finite = errors.wrong_non_finite,
          .without_keys = errors.nonzero_without_keys};
}

void Guard::Watch::react(const ForwardEvent& event, const Place& place, GuardFinding finding) {
  const bool is_moved = options_.on_failure == GuardAction::replace && replace(event, place, finding.action);
  if (options_.on_failure == GuardAction::raise) finding.action = "raised";
  const bool is_first = place.layer.add(finding);
  if (is_first || is_moved) log(LogLevel::warning, finding.text());
  if (options_.on_event) options_.on_event(finding);
  if (options_.on_failure == GuardAction::raise) throw Error("RuntimeError", finding.text());
}

bool Guard::Watch::replace(const ForwardEvent& event, const Place& place, std::string& action) {
  const std::string failed = event.computed->backend().get_name();
  place.layer.detour->avoid(failed);
  has_detours_.store(true, std::memory_order_release);
  std::vector<std::string> reasons;
  std::vector<std::string> refusals;
  while (const BackendClass backend = place.layer.detour->choose(event, &(refusals = {}))) {
    if (try_replacement(event, place, backend, reasons)) {
      place.layer.set_replaced(backend->get_name(), place.call);
      action = fmt::format("{} replaces {} in this {}, from this call on", backend->get_name(), failed,
                           options_.scope == GuardScope::role ? "role" : "layer");
      return true;
    }
    place.layer.detour->avoid(backend->get_name());
  }
  place.layer.set_replaced("", place.call);
  if (!reasons.empty()) run_counted(*event.computed, event.call);  // as it was
  reasons.insert(reasons.end(), refusals.begin(), refusals.end());
  action = fmt::format("no safer back end: {}",
                       reasons.empty() ? "there is no other" : fmt::format("{}", fmt::join(reasons, "; ")));
  return false;
}

bool Guard::Watch::try_replacement(const ForwardEvent& event, const Place& place, const BackendClass& backend,
                                   std::vector<std::string>& reasons) {
  try {
    const AttentionImpl& safer = place.layer.replacement(backend, event.impl);
    run_counted(safer, event.call);
    const GuardFinding again = look(event, safer, place);
    if (again.failed()) reasons.push_back(again.text());
    return !again.failed();
  } catch (const std::exception& error) {
    if (is_interrupt(error)) throw;
    reasons.push_back(fmt::format("{}: {}", backend->get_name(), text_of(error)));
    return false;
  }
}

Guard::Guard(GuardOptions options) {
  check(options);
  watch_ = std::make_shared<Watch>(std::move(options));
  observation_ = std::make_unique<ForwardObservation>(watch_);
}

Guard::~Guard() = default;

GuardReport Guard::report() const { return watch_->report(); }

void Guard::end() { observation_.reset(); }

}  // namespace ditattn
