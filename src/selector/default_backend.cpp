#include "selector/default_backend.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <mutex>

#include "core/fork_locks.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/threads.hpp"
#include "registry/check_call.hpp"
#include "registry/enum.hpp"
#include "registry/table_backend.hpp"
#include "selector/tune_call.hpp"
#include "tuner/tune_cache.hpp"

namespace ditattn {
namespace {

// What any of the candidates can do; the rest, such as the alignment, as the first.
Capabilities joined_capabilities(const DispatchRules& rules) {
  Capabilities can = rules.in_order.front().backend->capabilities();
  const auto add = [](auto& to, const auto& from) {
    for (const auto& value : from) {
      if (std::ranges::find(to, value) == to.end()) to.push_back(value);
    }
  };
  for (const Candidate& candidate : rules.in_order) {
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
    can.alignment = std::min(can.alignment, other.alignment);
  }
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const Capabilities& other = rules.at(i).backend->capabilities();
    can.graph_safe &= other.graph_safe;
    can.masked_nan_propagates |= other.masked_nan_propagates;
  }
  return can;
}

bool same_problem(const Problem& a, const Problem& b) {
  return same_measurement(a, b) && a.lse == b.lse && a.device.device_type == b.device.device_type &&
         a.device.device_id == b.device.device_id;
}

// Rules with the choice that each thread made last: a model asks the same hundreds of times, and a call asks twice.
class Chooser {
 public:
  explicit Chooser(DispatchRules rules) : rules_(std::move(rules)) {}

  [[nodiscard]] const DispatchRules& rules() const { return rules_; }

  /// What holds for a problem: who computes it, and whether that is to be measured first.
  struct Answer {
    DispatchChoice choice;
    bool is_online = false;
  };

  [[nodiscard]] const Answer& operator()(const Problem& problem) const {
    struct Last {
      std::uint64_t id = 0;
      std::uint64_t changes = 0;  // registrations and measurements when it was asked
      int threads = 0;            // what was measured with others does not count
      Problem problem;
      Answer answer;
    };
    thread_local Last last;
    const std::uint64_t changes = registration_changes();
    const int threads = num_threads();
    if (last.id != id_ || last.changes != changes || last.threads != threads || !same_problem(last.problem, problem)) {
      last.id = 0;  // until it is answered: asking may throw
      last.answer = {.choice = choose(rules_, problem, table_for(rules_, problem.device).get()),
                     .is_online = rules_.is_measured && current_tune_mode() == TuneMode::online};
      last.changes = changes;
      last.threads = threads;
      last.problem = problem;
      last.id = id_;
    }
    return last.answer;
  }

 private:
  static std::uint64_t next_id() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
  }

  DispatchRules rules_;
  std::uint64_t id_ = next_id();  // an address could come again
};

// Implementations of the candidates, built when a call first needs them.
class DefaultImpl final : public AttentionImpl {
 public:
  DefaultImpl(const ImplConfig& config, const Chooser& chooser)
      : AttentionImpl(config), chooser_(chooser), slots_(chooser.rules().size()) {
    leave_counting_to_others();
  }

  void run(const AttentionCall& call) const override {
    const Problem problem = problem_of_call(call);
    const Chooser::Answer* answer = &chooser_(problem);
    if (answer->is_online) {
      tune_at_first_call(call, problem, config());
      answer = &chooser_(problem);
    }
    const DispatchChoice& choice = answer->choice;
    // `forward` asked explain(): one takes it, or a backend changed its mind.
    if (!choice.index) throw ValueError(fmt::format("{}", fmt::join(choice.refusals, "; ")));
    const std::size_t index = *choice.index;
    if (index > 0) log_move(choice, index);
    impl(index).run(call);
    BackendAccess::count_launch(impl(index));
  }

 private:
  struct Slot {
    std::atomic<const AttentionImpl*> ready = nullptr;  // `impl`, once it is built: call_once is slow where it was
    std::once_flag built;
    std::once_flag logged;
    std::unique_ptr<AttentionImpl> impl;
  };

  Problem problem_of_call(const AttentionCall& call) const {
    if (const Problem* checked = BackendAccess::CheckedProblem::of(*this)) return *checked;
    Problem problem = problem_of(*this, call.query, call.key, call.value, call.metadata);
    problem.lse = call.lse.defined();
    problem.alignment = std::min(problem.alignment, alignment_of(call.out));
    return problem;
  }

  const AttentionImpl& impl(std::size_t index) const {
    Slot& slot = slots_[index];
    if (const AttentionImpl* ready = slot.ready.load(std::memory_order_acquire)) return *ready;
    std::call_once(slot.built, [&] {
      slot.impl = BackendAccess::create(rules().at(index).backend, config());
      slot.ready.store(slot.impl.get(), std::memory_order_release);
    });
    return *slot.impl;
  }

  void log_move(const DispatchChoice& choice, std::size_t index) const {
    std::call_once(slots_[index].logged, [&] {
      log(choice.is_measured ? LogLevel::info : rules().level,
          fmt::format("{} moves on to {}{}: {}", rules().subject, rules().at(index).member.name(),
                      config().prefix.empty() ? "" : fmt::format(" in '{}'", config().prefix),
                      choice.is_measured ? "it was measured to be the fastest"
                                         : fmt::format("{}", fmt::join(choice.refusals, "; "))));
    });
  }

  [[nodiscard]] const DispatchRules& rules() const { return chooser_.rules(); }

  const Chooser& chooser_;  // of the class, which every implementation keeps alive
  mutable std::deque<Slot> slots_;
};

class DefaultBackend final : public AttentionBackend {
 public:
  explicit DefaultBackend(DispatchRules rules)
      : chooser_(std::move(rules)), capabilities_(joined_capabilities(this->rules())) {}

  [[nodiscard]] const DispatchRules& rules() const { return chooser_.rules(); }
  [[nodiscard]] std::string get_name() const override { return rules().in_order.front().backend->get_name(); }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    const DispatchChoice& choice = chooser_(problem).choice;
    return choice.index ? Verdict() : Verdict{.reasons = choice.refusals};
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<DefaultImpl>(config, chooser_);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override {
    std::vector<std::string> known;
    for (std::size_t i = 0; i < rules().size(); ++i) {
      const std::vector<std::string> keys = BackendAccess::known_kwargs(*rules().at(i).backend);
      known.insert(known.end(), keys.begin(), keys.end());
    }
    return known;
  }

 private:
  Chooser chooser_;
  Capabilities capabilities_;
};

// Whether what the member gave for some problem of this dtype was not finite: it is trusted with none then.
bool is_broken(const TunedTable& table, Member member, DLDataType dtype) {
  return std::isnan(table.worst_error(member, dtype).value_or(0));
}

std::optional<std::size_t> measured_best(const DispatchRules& rules, const Problem& problem, const TunedTable& table,
                                         double max_error) {
  const TunedEntry* entry = table.find(problem);
  if (entry == nullptr) return std::nullopt;
  const auto index_of = [&](Member member) {
    std::size_t i = 0;
    while (i < rules.size() && rules.at(i).member != member) ++i;
    return i;
  };
  const auto may_take = [&](Member member) {
    const std::size_t i = index_of(member);
    return i < rules.size() && !is_broken(table, member, problem.dtype) &&
           verdict_on(rules.at(i), rules.in_order.front(), problem);
  };
  const auto best = best_of(*entry, rules.in_order, max_error, may_take);
  return best ? std::optional(index_of(*best)) : std::nullopt;
}

}  // namespace

std::shared_ptr<const TunedTable> table_for(const DispatchRules& rules, DLDevice device) {
  return rules.is_measured ? tuned_table(device) : nullptr;
}

DispatchChoice choose(const DispatchRules& rules, const Problem& problem, const TunedTable* table) {
  const double max_error = rules.max_error.value_or(exact_error(problem.dtype));
  if (table != nullptr) {
    if (const auto best = measured_best(rules, problem, *table, max_error)) return {.index = best, .is_measured = true};
  }
  DispatchChoice choice;
  std::optional<std::size_t> distrusted;
  for (std::size_t i = 0; i < rules.in_order.size(); ++i) {
    const Candidate& candidate = rules.in_order[i];
    Verdict verdict = verdict_on(candidate, rules.in_order.front(), problem);
    const auto worst = table != nullptr ? table->worst_error(candidate.member, problem.dtype) : std::nullopt;
    if (verdict && worst && !(*worst <= max_error)) {
      if (!distrusted) distrusted = i;
      verdict.reasons.push_back(fmt::format("{} was measured to be wrong by {:.1e} in {}, more than {:.1e}",
                                            candidate.member.name(), *worst, dtype_name(problem.dtype), max_error));
    }
    if (verdict) {
      choice.index = i;
      return choice;
    }
    choice.refusals.push_back(verdict.text());
  }
  choice.index = distrusted;  // better than nothing, which is what the others do
  if (!distrusted) choice.refusals.insert(choice.refusals.begin(), rules.passed_over.begin(), rules.passed_over.end());
  return choice;
}

BackendClass default_backend(DispatchRules rules) {
  if (rules.size() == 1) return rules.in_order.front().backend;
  static std::mutex mutex;
  [[maybe_unused]] static const bool held = hold_over_fork(mutex);
  static auto& made = *new std::deque<std::shared_ptr<const DefaultBackend>>;
  constexpr std::size_t most_kept = 64;  // registrations that change for ever must not fill memory
  std::lock_guard lock(mutex);
  for (const auto& known : made) {
    if (known->rules() == rules) return known;
  }
  if (made.size() == most_kept) made.pop_front();
  return made.emplace_back(std::make_shared<const DefaultBackend>(std::move(rules)));
}

}  // namespace ditattn
