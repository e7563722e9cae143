#include "tuner/measure_call.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "core/interrupt.hpp"
#include "core/row_reference.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "registry/table_backend.hpp"
#include "tuner/rounds.hpp"
#include "tuner/tune_cache.hpp"

namespace ditattn {
namespace {

constexpr double kTooSlow = 3;         // times a rival's time: timed once, by its quickest call that warmed up
constexpr double kHopelessMs = 1000;   // a first call that is longer, and far slower than a rival's: timed by itself
constexpr double kFinalists = 1.1;     // times a rival's time at most: timed again, to tell apart
constexpr double kFinalsBudget = 0.5;  // of the budget

// Errors are measured on; docs/tuning.md says by how much they vary. Fewer where a head's logits would fill memory.
std::int64_t num_rows(const Problem& p) {
  constexpr std::int64_t most_logits = std::int64_t{1} << 26;
  return std::clamp<std::int64_t>(most_logits / std::max<std::int64_t>(p.seq_kv, 1), 32, 512);
}

std::array<std::int64_t, 4> out_shape(const Problem& p) { return {p.batch, p.seq_q, p.num_heads, p.head_size}; }

// One that works, with the entry of `Rounds` that times it.
struct Running {
  std::size_t result;
  std::size_t entry;
  std::unique_ptr<AttentionImpl> impl;
};

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

class Measurement {
 public:
  Measurement(const AttentionCall& call, const Problem& problem, const ImplConfig& config, const TuneOptions& options)
      : problem_(problem),
        config_(config),
        options_(options),
        rows_(sample_rows(problem, num_rows(problem), options.seed)),
        out_(empty(out_shape(problem), problem.dtype, problem.device)),
        lse_(problem.lse ? empty(std::array{problem.batch, problem.num_heads, problem.seq_q}, kFloat32, problem.device)
                         : Tensor()),
        call_{.query = call.query,
              .key = call.key,
              .value = call.value,
              .out = out_,
              .lse = lse_,
              .metadata = call.metadata},
        rounds_(problem.device) {}

  void add(const Contender& contender) {
    TunedResult& result = results_.emplace_back();
    result.backend = contender.member.name();
    result.class_path = contender.member.get_path();
    result.engine = contender.backend->capabilities().engine;
    result.reason = contender.verdict.text();
    if (!contender.verdict) return;
    report(result, "warming up");
    guarded(results_.size() - 1, [&] {
      Running running{
          .result = results_.size() - 1, .entry = 0, .impl = BackendAccess::create(contender.backend, config_)};
      const double first_ms = run_first(*running.impl, contender.backend->capabilities().causal_alignment, result);
      if (first_ms > kHopelessMs && is_beaten(result.error, first_ms, 2 * kTooSlow)) {
        result.median_ms = first_ms;
        return;
      }
      running.entry = rounds_.add([this, impl = running.impl.get()] { impl->run(call_); });
      running_.push_back(std::move(running));
    });
  }

  std::vector<TunedResult> finish() {
    run(within(kTooSlow), options_.budget_ms * (1 - kFinalsBudget));
    if (const auto finalists = within(kFinalists); finalists.size() > 1) {
      run(finalists, options_.budget_ms * kFinalsBudget);
    }
    for (const Running& running : running_) {
      if (results_[running.result].reason.empty())
        results_[running.result].median_ms = rounds_.median_ms(running.entry);
    }
    sort_results(results_);
    return std::move(results_);
  }

 private:
  void report(const TunedResult& result, std::string_view step) const {
    if (options_.report) options_.report(fmt::format("{} {}", result.backend, step));
  }

  // What a backend throws is its result, not the end of the measurement.
  template <class Body>
  void guarded(std::size_t result, const Body& body) {
    try {
      guard(results_[result].backend, body);
    } catch (const Error& error) {
      if (is_interrupt(error)) throw;
      results_[result].reason = error.message().empty() ? error.kind() : error.message();
    }
  }

  // Runs the first call, whose error is the result's, and returns its milliseconds. The output is filled with NaN
  // before (all bits set, in every float type): elements left unwritten show.
  double run_first(const AttentionImpl& impl, CausalAlignment alignment, TunedResult& result) {
    const Tensor unwritten = empty(out_shape(problem_), problem_.dtype);
    std::memset(unwritten.data_ptr(), 0xFF, tvm::ffi::GetDataSize(*unwritten.GetDLTensorPtr()));
    const Tensor out = problem_.device.device_type == kDLCPU ? unwritten : copy_to(unwritten, problem_.device);
    const AttentionCall call{.query = call_.query,
                             .key = call_.key,
                             .value = call_.value,
                             .out = out,
                             .lse = call_.lse,
                             .metadata = call_.metadata};
    const auto start = std::chrono::steady_clock::now();
    impl.run(call);
    synchronize(problem_.device);
    const double first_ms = ms_since(start);
    const double scale = config_.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(config_.head_size)));
    // For all contenders: their causal rules come to the same here.
    if (answers_.empty()) answers_ = answer_rows(call, scale, config_.causal, alignment, rows_);
    const RowErrors errors = compare_rows(call, rows_, answers_);
    const bool is_wrong = errors.wrong_non_finite > 0 || errors.nonzero_without_keys > 0;
    result.error = is_wrong ? std::numeric_limits<double>::quiet_NaN() : errors.rel_l2;
    return first_ms;
  }

  // Whether one that is no less exact is `factor` times faster.
  [[nodiscard]] bool is_beaten(double error, double ms, double factor) const {
    const double allowed =
        std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(error, exact_error(problem_.dtype));
    return std::ranges::any_of(running_, [&](const Running& rival) {
      return results_[rival.result].error <= allowed && ms > factor * rounds_.median_ms(rival.entry);
    });
  }

  // Entries that are not: the others are never chosen.
  [[nodiscard]] std::vector<std::size_t> within(double factor) const {
    std::vector<std::size_t> entries;
    for (const Running& running : running_) {
      if (!is_beaten(results_[running.result].error, rounds_.median_ms(running.entry), factor)) {
        entries.push_back(running.entry);
      }
    }
    return entries;
  }

  void run(const std::vector<std::size_t>& entries, double budget_ms) {
    const auto result_of = [&](std::size_t entry) {
      return std::ranges::find(running_, entry, &Running::entry)->result;
    };
    const int rounds = rounds_.affordable(entries, budget_ms);
    rounds_.run(
        entries, rounds, [&](std::size_t entry) { guarded(result_of(entry), [] { throw; }); },
        [&](std::size_t entry, int round) {
          report(results_[result_of(entry)], fmt::format("round {}/{}", round + 1, rounds));
        });
    std::erase_if(running_, [&](const Running& running) { return !results_[running.result].reason.empty(); });
  }

  const Problem& problem_;
  const ImplConfig& config_;
  const TuneOptions& options_;
  std::vector<Row> rows_;
  std::vector<RowAnswer> answers_;  // in these rows, once somebody was run
  Tensor out_;
  Tensor lse_;
  AttentionCall call_;
  Rounds rounds_;
  std::vector<TunedResult> results_;
  std::vector<Running> running_;
};

}  // namespace

double exact_error(DLDataType dtype) {
  // Measured over our own and cuDNN's kernels: at most 3e-3, 4e-4 and 1e-6. Quantized ones begin at 1e-2.
  if (dtype == kBFloat16) return 6e-3;
  return dtype == kFloat16 ? 1.5e-3 : 2e-5;
}

TunedProblem measure_call(const AttentionCall& call, const Problem& problem, const ImplConfig& config,
                          const std::vector<Contender>& contenders, const TuneOptions& options) {
  Measurement measurement(call, problem, config, options);
  for (const Contender& contender : contenders) measurement.add(contender);
  return {.problem = problem, .results = measurement.finish()};
}

}  // namespace ditattn
