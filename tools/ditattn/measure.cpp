#include "tools/ditattn/measure.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "tools/ditattn/exit_status.hpp"

namespace ditattn::cli {
namespace {

using Milliseconds = std::chrono::duration<double, std::milli>;

constexpr double kRoundsBudgetMs = 1000;  // of all backends together, where --repeats is not given
constexpr int kMinRounds = 3;
constexpr int kMaxRounds = 50;
constexpr double kSampleMs = 1;  // shorter calls are timed several at once: clocks and wake-ups would blur them
constexpr int kMaxCallsPerSample = 1000;
constexpr double kWarmUpMs = 20;
constexpr int kMaxWarmUpCalls = 10;

// One backend under measurement.
struct Candidate {
  BackendResult* result;
  std::unique_ptr<AttentionImpl> attention;
  CausalAlignment alignment;
  double call_ms = 0;  // estimate of one call, from warming up
  std::vector<double> samples_ms = {};
  bool broken = false;
};

class CaseMeasurement {
 public:
  CaseMeasurement(const Inputs& inputs, ImplConfig config, const MeasureOptions& options, Problem& problem)
      : inputs_(options.device.device_type == kDLCPU ? inputs : inputs_on(inputs, options.device)),
        config_(std::move(config)),
        options_(options) {
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
      Candidate candidate{.result = &result,
                          .attention = info.backend->make(config_),
                          .alignment = info.backend->capabilities().causal_alignment};
      check_first_output(candidate);
      warm_up(candidate);
      candidates_.push_back(std::move(candidate));
    });
  }

  void time_rounds(const StepReport& report) {
    const int rounds = options_.repeats.value_or(affordable_rounds());
    for (int round = 0; round < rounds; ++round) {
      for (Candidate& candidate : candidates_) {
        report(fmt::format("{} round {}/{}", candidate.result->backend, round + 1, rounds));
        candidate.broken = !guarded(*candidate.result, [&] { candidate.samples_ms.push_back(sample(candidate)); });
      }
      std::erase_if(candidates_, [](const Candidate& candidate) { return candidate.broken; });
    }
    for (Candidate& candidate : candidates_) candidate.result->timing = timing_of(candidate.samples_ms);
  }

 private:
  // What a backend throws is its result, not the end of the comparison. False where it threw.
  template <class Body>
  static bool guarded(BackendResult& result, const Body& body) {
    try {
      body();
      return true;
    } catch (...) {
      const Failure failure = current_failure();
      result.status = failure.status == kRefused       ? Status::unsupported
                      : failure.status == kUnavailable ? Status::unavailable
                                                       : Status::failed;
      result.reason = failure.message;
      return false;
    }
  }

  void call(const Candidate& candidate) const {
    candidate.attention->forward(inputs_.query, inputs_.key, inputs_.value, inputs_.metadata, {.out = out_, .lse = {}});
  }

  // The output is filled with NaN first (all bits set, in every float type): elements left unwritten show.
  void check_first_output(const Candidate& candidate) {
    const Tensor unwritten = empty({out_.shape().data(), static_cast<std::size_t>(out_.ndim())}, out_.dtype());
    std::memset(unwritten.data_ptr(), 0xFF, tvm::ffi::GetDataSize(*unwritten.GetDLTensorPtr()));
    out_ = copy_to(unwritten, options_.device);
    call(candidate);
    const Accuracy accuracy = oracle_->measure(copy_to(out_, kCpu), candidate.alignment);
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

  void warm_up(Candidate& candidate) const {
    const auto start = std::chrono::steady_clock::now();
    for (int calls = 0; calls < kMaxWarmUpCalls; ++calls) {
      const auto before = std::chrono::steady_clock::now();
      call(candidate);
      synchronize(options_.device);
      const auto now = std::chrono::steady_clock::now();
      candidate.call_ms = Milliseconds(now - before).count();
      if (Milliseconds(now - start).count() > kWarmUpMs) break;
    }
  }

  [[nodiscard]] int affordable_rounds() const {
    double round_ms = 0;
    for (const Candidate& candidate : candidates_) round_ms += std::max(candidate.call_ms, kSampleMs);
    return static_cast<int>(
        std::clamp<double>(kRoundsBudgetMs / std::max(round_ms, kSampleMs), kMinRounds, kMaxRounds));
  }

  [[nodiscard]] double sample(const Candidate& candidate) const {
    const double wanted = kSampleMs / std::max(candidate.call_ms, 1e-6);
    const int calls = static_cast<int>(std::clamp<double>(std::ceil(wanted), 1, kMaxCallsPerSample));
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) call(candidate);
    synchronize(options_.device);
    return Milliseconds(std::chrono::steady_clock::now() - start).count() / calls;
  }

  [[nodiscard]] Timing timing_of(std::vector<double> samples) const {
    std::ranges::sort(samples);
    const std::size_t middle = samples.size() / 2;
    const double median = samples.size() % 2 == 1 ? samples[middle] : (samples[middle - 1] + samples[middle]) / 2;
    return {.median_ms = median, .min_ms = samples.front(), .tflops = operations(problem_) / (median * 1e-3) / 1e12};
  }

  Inputs inputs_;  // on the device
  ImplConfig config_;
  const MeasureOptions& options_;
  Problem problem_;
  Tensor out_;
  std::unique_ptr<Oracle> oracle_;
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
