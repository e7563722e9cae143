#include "selector/default_backend.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <deque>
#include <mutex>

#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "registry/check_call.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

// Whether the two causal rules differ for this problem: they agree where as many keys as rows are seen.
bool depends_on_alignment(const Problem& problem) {
  return problem.causal && (problem.seq_q != problem.seq_kv || problem.packed);
}

// What any of the candidates can do; the rest, such as the alignment, as the first.
Capabilities joined_capabilities(const std::vector<Candidate>& candidates) {
  Capabilities can = candidates.front().backend->capabilities();
  const auto add = [](auto& to, const auto& from) {
    for (const auto& value : from) {
      if (std::ranges::find(to, value) == to.end()) to.push_back(value);
    }
  };
  for (const Candidate& candidate : candidates) {
    const Capabilities& other = candidate.backend->capabilities();
    add(can.devices, other.devices);
    add(can.dtypes, other.dtypes);
    add(can.masks, other.masks);
    if (other.head_sizes.any()) can.head_sizes = other.head_sizes;
    can.gqa |= other.gqa;
    can.causal |= other.causal;
    can.lse |= other.lse;
    can.packed |= other.packed;
    can.joint |= other.joint;
    can.fp8_kv |= other.fp8_kv;
    can.graph_safe &= other.graph_safe;
    can.masked_nan_propagates |= other.masked_nan_propagates;
    can.alignment = std::min(can.alignment, other.alignment);
  }
  return can;
}

// Implementations of the candidates, built when a call first needs them.
class DefaultImpl final : public AttentionImpl {
 public:
  DefaultImpl(const ImplConfig& config, const std::vector<Candidate>& candidates)
      : AttentionImpl(config), candidates_(candidates), slots_(candidates.size()) {
    leave_counting_to_others();
  }

  void run(const AttentionCall& call) const override {
    Problem problem = check_call(*this, call.query, call.key, call.value, call.metadata);
    problem.lse = call.lse.defined();
    problem.alignment = std::min(problem.alignment, alignment_of(call.out));
    std::vector<std::string> refusals;
    // `forward` asked explain(): one takes it, or a backend changed its mind.
    const std::size_t chosen = first_that_takes(candidates_, problem, refusals);
    if (chosen == candidates_.size()) throw ValueError(fmt::format("{}", fmt::join(refusals, "; ")));
    if (chosen > 0) log_move(chosen, refusals);
    impl(chosen).run(call);
    BackendAccess::count_launch(impl(chosen));
  }

 private:
  struct Slot {
    std::once_flag built;
    std::once_flag logged;
    std::unique_ptr<AttentionImpl> impl;
  };

  const AttentionImpl& impl(std::size_t index) const {
    Slot& slot = slots_[index];
    std::call_once(slot.built, [&] { slot.impl = BackendAccess::create(candidates_[index].backend, config()); });
    return *slot.impl;
  }

  void log_move(std::size_t chosen, const std::vector<std::string>& refusals) const {
    std::call_once(slots_[chosen].logged, [&] {
      log(LogLevel::info, fmt::format("Platform default moves on to {}{}: {}", candidates_[chosen].member.name(),
                                      config().prefix.empty() ? "" : fmt::format(" in '{}'", config().prefix),
                                      fmt::join(refusals, "; ")));
    });
  }

  const std::vector<Candidate>& candidates_;  // of the class, which every implementation keeps alive
  mutable std::deque<Slot> slots_;
};

class DefaultBackend final : public AttentionBackend {
 public:
  explicit DefaultBackend(std::vector<Candidate> candidates)
      : candidates_(std::move(candidates)), capabilities_(joined_capabilities(candidates_)) {}

  [[nodiscard]] const std::vector<Candidate>& candidates() const { return candidates_; }
  [[nodiscard]] std::string get_name() const override { return candidates_.front().backend->get_name(); }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict;
    if (first_that_takes(candidates_, problem, verdict.reasons) < candidates_.size()) verdict.reasons.clear();
    return verdict;
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<DefaultImpl>(config, candidates_);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override {
    std::vector<std::string> known;
    for (const Candidate& candidate : candidates_) {
      const std::vector<std::string> keys = BackendAccess::known_kwargs(*candidate.backend);
      known.insert(known.end(), keys.begin(), keys.end());
    }
    return known;
  }

 private:
  std::vector<Candidate> candidates_;
  Capabilities capabilities_;
};

}  // namespace

Verdict verdict_on(const Candidate& candidate, const Candidate& first, const Problem& problem) {
  Verdict verdict = candidate.backend->explain(problem);
  const auto alignment = [](const Candidate& of) { return of.backend->capabilities().causal_alignment; };
  if (verdict && depends_on_alignment(problem) && alignment(candidate) != alignment(first)) {
    verdict.reasons.push_back(fmt::format("{} aligns causality otherwise than {} ({} queries, {} keys{})",
                                          candidate.member.name(), first.member.name(), problem.seq_q, problem.seq_kv,
                                          problem.packed ? ", packed" : ""));
  }
  return verdict;
}

std::size_t first_that_takes(const std::vector<Candidate>& candidates, const Problem& problem,
                             std::vector<std::string>& refusals) {
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const Verdict verdict = verdict_on(candidates[i], candidates.front(), problem);
    if (verdict) return i;
    refusals.push_back(verdict.text());
  }
  return candidates.size();
}

BackendClass default_backend(const std::vector<Candidate>& candidates) {
  if (candidates.size() == 1) return candidates.front().backend;
  static std::mutex mutex;
  static auto& made = *new std::deque<std::shared_ptr<const DefaultBackend>>;
  constexpr std::size_t most_kept = 64;  // registrations that change for ever must not fill memory
  std::lock_guard lock(mutex);
  for (const auto& known : made) {
    if (known->candidates() == candidates) return known;
  }
  if (made.size() == most_kept) made.pop_front();
  return made.emplace_back(std::make_shared<const DefaultBackend>(candidates));
}

}  // namespace ditattn
