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

// One backend under measurement, on one rank or on all.
struct Candidate {
  BackendResult* result;
  std::size_t entry;  // of the rounds
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
      const std::shared_ptr<AttentionImpl> attention = info.backend->make(config_);
      judge(result, first_output(*attention), info.backend->capabilities().causal_alignment);
      candidates_.push_back({&result, rounds_.add([this, attention] { call(*attention); })});
    });
  }

  // The same over all ranks, of a backend that works on one. `index` is the backend's.
  void prepare(const BackendInfo& info, RankLeader& ranks, std::size_t index, BackendResult& result) {
    guarded(result, [&] {
      judge(result, ranks.first_output(index), info.backend->capabilities().causal_alignment);
      candidates_.push_back({&result, rounds_.add([&ranks, index] { ranks.forward(index); })});
    });
  }

  void time_rounds(const StepReport& report) {
    std::vector<std::size_t> entries;
    entries.reserve(candidates_.size());
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
  // What a backend throws is its result, not the end of the comparison, as a lost rank is.
  template <class Body>
  static void guarded(BackendResult& result, const Body& body) {
    try {
      body();
    } catch (const CommunicationError&) {
      throw;
    } catch (const TimeoutError&) {
      throw;
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
  Tensor first_output(const AttentionImpl& attention) {
    const Tensor unwritten = empty({out_.shape().data(), static_cast<std::size_t>(out_.ndim())}, out_.dtype());
    std::memset(unwritten.data_ptr(), 0xFF, tvm::ffi::GetDataSize(*unwritten.GetDLTensorPtr()));
    out_ = copy_to(unwritten, options_.device);
    call(attention);
    return copy_to(out_, kCpu);
  }

  void judge(BackendResult& result, const Tensor& out, CausalAlignment alignment) {
    const Accuracy accuracy = oracle_->measure(out, alignment);
    result.accuracy = accuracy;
    const auto fail = [&](std::int64_t elements, const char* what) {
      result.status = Status::failed;
      result.reason = fmt::format("{} elements of the output {}", elements, what);
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

// Notes on those that are beyond the bound.
void note_excess(std::vector<BackendResult>& results, double bound) {
  for (BackendResult& entry : results) {
    if (entry.status != Status::ok || !entry.timing || !entry.accuracy || is_within(entry, bound)) continue;
    entry.reason = fmt::format("rel_l2 {:.3e} exceeds the bound {:.3e}", entry.accuracy->rel_l2, bound);
  }
}

// The fastest backend within the bound.
std::optional<std::string> recommend(const CaseResult& result) {
  std::optional<std::string> best;
  double best_ms = 0;
  for (const BackendResult& entry : result.results) {
    if (!entry.timing || !is_within(entry, result.error_bound)) continue;
    if (best && best_ms <= entry.timing->median_ms) continue;
    best = entry.backend;
    best_ms = entry.timing->median_ms;
  }
  return best;
}

}  // namespace

CaseResult measure_case(const Case& problem_case, const std::vector<BackendInfo>& backends,
                        const MeasureOptions& options, RankLeader* ranks, const StepReport& report) {
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
  if (ranks != nullptr) result.over_ranks = result.results;
  for (std::size_t i = 0; i < result.over_ranks.size(); ++i) {
    BackendResult& entry = result.over_ranks[i];
    if (entry.status != Status::ok) continue;
    report(fmt::format("{} warming up over all ranks", entry.backend));
    measurement.prepare(backends[i], *ranks, i, entry);
  }
  measurement.time_rounds(report);
  note_excess(result.results, result.error_bound);
  note_excess(result.over_ranks, result.error_bound);
  result.recommended = recommend(result);
  return result;
}

}  // namespace ditattn::cli
