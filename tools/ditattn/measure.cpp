#include "tools/ditattn/measure.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tuner/rounds.hpp"

namespace ditattn::cli {
namespace {

constexpr double kRoundsBudgetMs = 1000;  // of all backends together, where --repeats is not given

// One backend under measurement.
struct Candidate {
  BackendResult* result;
  std::unique_ptr<AttentionImpl> attention;
  std::size_t entry = 0;  // of the rounds
};

class CaseMeasurement {
 public:
  CaseMeasurement(const Inputs& inputs, ImplConfig config, const MeasureOptions& options, Problem& problem)
      : inputs_(options.device.device_type == kDLCPU ? inputs : inputs_on(inputs, options.device)),
        config_(std::move(config)),
        options_(options),
        rounds_(options.device) {
    problem_ = problem = check_inputs(inputs_, config_);
    out_ = allocate_out(problem_);
    oracle_ = std::make_unique<Oracle>(inputs, config_, problem_, options.seed);
  }

  Oracle& oracle() { return *oracle_; }

  // Fills in `result` for one backend and, where it works, keeps it for the rounds.
  void prepare(const BackendInfo& info, BackendResult& result) {
    if (!info.available) {
      result.status = Status::unavailable;
      result.reason = info.reason;
      return;
    }
    if (const Verdict verdict = info.backend->explain(problem_); !verdict) {
      result.status = Status::unsupported;
      result.reason = verdict.text();
      return;
    }
    if (std::string kernel = info.backend->kernel_name(problem_); !kernel.empty()) result.engine = std::move(kernel);
    guarded(result, [&] {
      Candidate candidate{.result = &result, .attention = info.backend->make(config_)};
      check_first_output(candidate, info.backend->capabilities().causal_alignment);
      candidate.entry = rounds_.add([this, attention = candidate.attention.get()] { call(*attention); });
      candidates_.push_back(std::move(candidate));
    });
  }

  void time_rounds(const StepReport& report) {
    std::vector<std::size_t> entries;
    for (const Candidate& candidate : candidates_) entries.push_back(candidate.entry);
    const auto result_of = [&](std::size_t entry) -> BackendResult& {
      return *std::ranges::find(candidates_, entry, &Candidate::entry)->result;
    };
    const int rounds = options_.repeats.value_or(rounds_.affordable(entries, kRoundsBudgetMs));
    std::set<std::size_t> broken;
    rounds_.run(
        entries, rounds,
        [&](std::size_t entry) {
          broken.insert(entry);
          guarded(result_of(entry), [] { throw; });
        },
        [&](std::size_t entry, int round) {
          report(fmt::format("{} round {}/{}", result_of(entry).backend, round + 1, rounds));
        });
    for (const Candidate& candidate : candidates_) {
      if (!broken.contains(candidate.entry)) candidate.result->timing = timing_of(candidate.entry);
    }
  }

 private:
  // What a backend throws is its result, not the end of the comparison.
  template <class Body>
  static void guarded(BackendResult& result, const Body& body) {
    try {
      body();
    } catch (...) {
      const Failure failure = current_failure();
      result.status = failure.status == kRefused       ? Status::unsupported
                      : failure.status == kUnavailable ? Status::unavailable
                                                       : Status::failed;
      result.reason = failure.message;
    }
  }

  void call(const AttentionImpl& attention) const {
    attention.forward(inputs_.query, inputs_.key, inputs_.value, inputs_.metadata, {.out = out_, .lse = {}});
  }

  // The output is filled with NaN first (all bits set, in every float type): elements left unwritten show.
  void check_first_output(const Candidate& candidate, CausalAlignment alignment) {
    const Tensor unwritten = empty({out_.shape().data(), static_cast<std::size_t>(out_.ndim())}, out_.dtype());
    std::memset(unwritten.data_ptr(), 0xFF, tvm::ffi::GetDataSize(*unwritten.GetDLTensorPtr()));
    out_ = copy_to(unwritten, options_.device);
    call(*candidate.attention);
    const Accuracy accuracy = oracle_->measure(copy_to(out_, kCpu), alignment);
    candidate.result->accuracy = accuracy;
    const auto fail = [&](std::int64_t elements, const char* what) {
      candidate.result->status = Status::failed;
      candidate.result->reason = fmt::format("{} elements of the output {}", elements, what);
    };
    if (accuracy.nonzero_without_keys > 0) fail(accuracy.nonzero_without_keys, "are not zero in rows that see no key");
    if (accuracy.wrong_non_finite > 0) {
      fail(accuracy.wrong_non_finite, "are NaN or infinite where the float64 reference is not, or the other way round");
    }
  }

  [[nodiscard]] Timing timing_of(std::size_t entry) const {
    const double median = rounds_.median_ms(entry);
    return {.median_ms = median,
            .min_ms = rounds_.sorted_ms(entry).front(),
            .tflops = operations(problem_) / (median * 1e-3) / 1e12};
  }

  Inputs inputs_;  // on the device
  ImplConfig config_;
  const MeasureOptions& options_;
  Problem problem_;
  Tensor out_;
  std::unique_ptr<Oracle> oracle_;
  Rounds rounds_;
  std::vector<Candidate> candidates_;
};

// The fastest backend within the bound; notes on those that are not.
void recommend(CaseResult& result) {
  const BackendResult* best = nullptr;
  for (BackendResult& entry : result.results) {
    if (entry.status != Status::ok || !entry.timing) continue;
    if (!is_within(entry, result.error_bound)) {
      entry.reason = fmt::format("rel_l2 {:.3e} exceeds the bound {:.3e}", entry.accuracy->rel_l2, result.error_bound);
    } else if (best == nullptr || entry.timing->median_ms < best->timing->median_ms) {
      best = &entry;
    }
  }
  if (best != nullptr) result.recommended = best->backend;
}

}  // namespace

CaseResult measure_case(const Case& problem_case, const std::vector<BackendInfo>& backends,
                        const MeasureOptions& options, const StepReport& report) {
  ImplConfig config = config_for(problem_case.inputs);
  config.causal |= options.causal;
  CaseResult result{.name = problem_case.name, .place = problem_case.place};
  CaseMeasurement measurement(problem_case.inputs, config, options, result.problem);
  result.sample_rows = measurement.oracle().sample_rows();
  result.exact_bound = measurement.oracle().error_bound();
  result.error_bound = options.max_error.value_or(result.exact_bound);
  for (const BackendInfo& info : backends) {
    result.results.push_back({.backend = info.member.name(), .engine = info.engine()});
  }
  for (std::size_t i = 0; i < backends.size(); ++i) {
    report(fmt::format("{} warming up", backends[i].member.name()));
    measurement.prepare(backends[i], result.results[i]);
  }
  measurement.time_rounds(report);
  recommend(result);
  return result;
}

}  // namespace ditattn::cli
