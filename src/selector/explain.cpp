#include <fmt/format.h>

#include <algorithm>

#include "core/interrupt.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/selector.hpp"
#include "selector/choice.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;

// The member's answer, whatever is wrong with it. `first`, the candidate whose causal rule holds, is this one if none
// yet.
MemberVerdict ask(Enum member, const Problem& problem, std::optional<Candidate>& first) {
  MemberVerdict answer{.member = member, .backend = {}, .verdict = {}};
  try {
    answer.backend = member.get_class();
    answer.backend->validate_available();
    const Candidate candidate{.member = member, .backend = answer.backend};
    if (!first) first = candidate;
    answer.verdict = verdict_on(candidate, *first, problem);
    if (answer.verdict) answer.kernel = answer.backend->kernel_name(problem);
  } catch (const tvm::ffi::Error& error) {  // of any language
    if (is_interrupt(error)) throw;
    answer.verdict.reasons.push_back(std::string(error.message()));
  }
  return answer;
}

// What the rules would do: the choice, and what speaks against those that are passed over for it.
void add_choice(const DispatchRules& rules, const Problem& problem, Explanation& explanation) {
  const auto table = table_for(rules, problem.device);
  const DispatchChoice choice = choose(rules, problem, table.get());
  if (!choice.index) return;
  explanation.chosen = rules.at(*choice.index).member;
  for (MemberVerdict& answer : explanation.members) {
    const auto found = std::ranges::find(rules.in_order, answer.member, &Candidate::member);
    const auto i = static_cast<std::size_t>(found - rules.in_order.begin());
    answer.is_candidate |= answer.member == explanation.chosen;
    if (answer.verdict && i < choice.refusals.size() && i != *choice.index) {
      answer.verdict.reasons.push_back(choice.refusals[i]);
    }
  }
  if (!rules.is_measured) return;
  const TunedEntry* entry = table ? table->find(problem) : nullptr;
  const double max_error = rules.max_error.value_or(exact_error(problem.dtype));
  explanation.why = choice.is_measured ? fmt::format("measured: the fastest with an error of at most {:.1e}", max_error)
                    : entry != nullptr
                        ? fmt::format("the platform's order: nothing was measured to be within {:.1e}", max_error)
                        : "the platform's order: the problem was not measured (ditattn tune)";
  if (entry == nullptr) return;
  for (MemberVerdict& answer : explanation.members) {
    const auto found = std::ranges::find(entry->tuned.results, answer.member.name(), &TunedResult::backend);
    if (found != entry->tuned.results.end()) answer.tuned = *found;
  }
}

}  // namespace

Explanation explain(const Problem& problem, const std::string& role, const AttentionConfig& config,
                    const std::string& role_category) {
  const Request request{.role = role,
                        .category = role_category,
                        .head_size = problem.head_size,
                        .device = std::string(device_type_name(problem.device))};
  const Choice choice = choose(request, config);
  const AttentionSpec spec = choice.spec.value_or(AttentionSpec());
  Explanation explanation{.source = choice.source, .is_explicit = !spec.is_automatic(), .members = {}, .chosen = {}};
  std::vector<Enum> order = order_of(request, spec);
  const DispatchRules rules = may_be_replaced(spec) ? rules_of(request, spec) : DispatchRules();
  // Where the automatic choice is the first alone, nobody after it is tried.
  const bool is_first_alone = spec.is_automatic() && !rules.is_measured && !rules.in_order.empty();
  const auto candidates =
      is_first_alone ? std::ranges::find(order, rules.in_order.front().member) - order.begin() + 1 : std::ssize(order);
  for (const Enum member : Enum::members()) {
    if (std::ranges::find(order, member) == order.end()) order.push_back(member);
  }
  std::optional<Candidate> first;
  if (!rules.in_order.empty()) first = rules.in_order.front();
  for (std::ptrdiff_t i = 0; i < std::ssize(order); ++i) {
    if (i >= candidates && explanation.is_explicit) first.reset();  // the others go by their own rules
    MemberVerdict& answer = explanation.members.emplace_back(ask(order[i], problem, first));
    answer.is_candidate = i < candidates;
  }
  if (!may_be_replaced(spec)) {
    if (explanation.members.front().verdict) explanation.chosen = order.front();
  } else if (!rules.in_order.empty()) {
    try {
      add_choice(rules, problem, explanation);
    } catch (const tvm::ffi::Error& error) {  // a candidate's, which is its verdict: `select_backend` would throw it
      if (is_interrupt(error)) throw;
    }
  }
  return explanation;
}

}  // namespace ditattn
