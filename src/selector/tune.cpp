// Measuring problems, for whoever asks: the public functions, and the first call of an unknown problem.

#include <fmt/format.h>

#include <algorithm>
#include <mutex>

#include "core/cuda_driver.hpp"
#include "core/fork_locks.hpp"
#include "core/interrupt.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/selector.hpp"
#include "ditattn/tuner.hpp"
#include "registry/check_any_call.hpp"
#include "registry/check_tensor.hpp"
#include "selector/choice.hpp"
#include "selector/tune_call.hpp"
#include "tuner/measure_call.hpp"
#include "tuner/random_call.hpp"

namespace ditattn {
namespace {

// The platform's candidates that can run here, then all other members that can.
std::vector<Candidate> all_candidates(const std::string& device) {
  std::vector<Candidate> candidates;
  for (const Member member : platform_candidates(device)) {
    try {
      candidates.push_back(candidate_of(member));
    } catch (const tvm::ffi::Error& error) {  // of any language: not to be had here
      if (is_interrupt(error)) throw;
    }
  }
  const std::vector<Candidate> others = available_beside(candidates);
  candidates.insert(candidates.end(), others.begin(), others.end());
  if (candidates.empty()) throw ImportError(fmt::format("No backend can run on device '{}' here.", device));
  return candidates;
}

// The causal rule is that of the platform's default, the first that has the head size.
std::vector<Contender> contenders_of(const std::vector<Candidate>& candidates, const std::vector<Member>& named,
                                     const Problem& problem) {
  const auto has_head_size = [&](const Candidate& candidate) {
    return candidate.backend->supports_head_size(problem.head_size);
  };
  const auto found = std::ranges::find_if(candidates, has_head_size);
  const Candidate& first = found == candidates.end() ? candidates.front() : *found;
  std::vector<Contender> contenders;
  for (const Candidate& candidate : candidates) {
    if (!named.empty() && std::ranges::find(named, candidate.member) == named.end()) continue;
    contenders.push_back(
        {.member = candidate.member, .backend = candidate.backend, .verdict = verdict_on(candidate, first, problem)});
  }
  return contenders;
}

void check_may_tune() {
  if (current_tune_mode() == TuneMode::frozen) {
    throw ValueError("DITATTN_TUNE is 'frozen': nothing is measured. Unset it to tune.");
  }
}

}  // namespace

TunedProblem tune_call(const ImplConfig& config, const Tensor& query, const Tensor& key, const Tensor& value,
                       const AttentionMetadata& metadata, const TuneOptions& options) {
  check_may_tune();
  for (const Member member : options.members)
    candidate_of(member);  // an explicit choice that cannot be had is an error
  check_rank_4("query", query);
  const std::vector<Candidate> candidates = all_candidates(std::string(device_type_name(query.device())));
  const Problem problem =
      check_any_call(config, query, key, value, metadata, candidates.front().backend->capabilities().causal_alignment);
  if (cuda::is_captured(problem.device))
    throw ValueError("A stream that is being captured into a graph cannot be timed.");
  if (problem.batch * problem.seq_q * problem.num_heads == 0) {
    throw ValueError(fmt::format("Query {} has no elements: there is nothing to measure.", shape_name(query)));
  }
  const Tensor none;
  const AttentionCall call{.query = query, .key = key, .value = value, .out = none, .lse = none, .metadata = metadata};
  TunedProblem measured =
      measure_call(call, problem, config, contenders_of(candidates, options.members, problem), options);
  const Others others = options.members.empty() ? Others::dropped : Others::kept;
  add_tuned(problem.device, measured, others, options.publish);
  return others == Others::dropped ? measured : tuned(problem).value_or(measured);
}

TunedProblem tune(const Problem& problem, const TuneOptions& options) {
  check_may_tune();
  const RandomCall call = random_call(problem, options.seed);
  return tune_call({.num_heads = problem.num_heads,
                    .head_size = problem.head_size,
                    .causal = problem.causal,
                    .num_kv_heads = problem.num_kv_heads},
                   call.query, call.key, call.value, call.metadata, options);
}

std::optional<TunedProblem> tuned(const Problem& problem) {
  const auto table = tuned_table(problem.device);
  const TunedEntry* entry = table ? table->find(problem) : nullptr;
  return entry != nullptr ? std::optional(entry->tuned) : std::nullopt;
}

std::optional<Member> tuned_member(const Problem& problem, std::optional<double> max_error) {
  const auto table = tuned_table(problem.device);
  if (table == nullptr || table->find(problem) == nullptr) return std::nullopt;
  const Request request{.role = {},
                        .category = {},
                        .head_size = problem.head_size,
                        .device = std::string(device_type_name(problem.device))};
  const DispatchRules rules = rules_of(request, {.max_error = max_error});
  if (rules.in_order.empty()) return std::nullopt;
  const DispatchChoice choice = choose(rules, problem, table.get());
  if (!choice.is_measured || !choice.index) return std::nullopt;
  return rules.at(*choice.index).member;
}

void tune_at_first_call(const AttentionCall& call, const Problem& problem, const ImplConfig& config) {
  const auto is_known = [&] {
    const auto table = tuned_table(problem.device);
    return table != nullptr && table->find(problem) != nullptr;
  };
  static std::mutex one_at_a_time;  // timings of two at once would be worth nothing
  [[maybe_unused]] static const bool renewed = renew_in_child(one_at_a_time);
  thread_local bool is_inside = false;  // a backend that is measured may ask for a default itself
  if (is_inside || is_known() || cuda::is_captured(problem.device)) return;
  const std::lock_guard lock(one_at_a_time);
  if (is_known()) return;
  const struct Inside {
    Inside() { is_inside = true; }
    ~Inside() { is_inside = false; }
  } inside;
  TunedProblem measured{.problem = problem, .results = {}};
  try {
    const std::vector<Candidate> candidates = all_candidates(std::string(device_type_name(problem.device)));
    measured = measure_call(call, problem, config, contenders_of(candidates, {}, problem), {});
    add_tuned(problem.device, measured, Others::dropped, true);
  } catch (const Error& error) {
    if (is_interrupt(error)) throw;
    log(LogLevel::warning, fmt::format("Measuring at the first call failed: {}", error.message()));
    if (measured.results.empty()) add_tuned(problem.device, measured, Others::dropped, false);
  }
}

}  // namespace ditattn
