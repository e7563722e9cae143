#include "ditattn/selector.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <mutex>
#include <set>

#include "core/environment.hpp"
#include "core/text.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "selector/default_backend.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;

// What was asked for; texts for messages.
struct Request {
  const std::string& role;
  const std::string& category;
  std::int64_t head_size;
  std::string device;
};

// Passes each text on once: a model has hundreds of layers.
void log_once(const std::string& text) {
  static std::mutex mutex;
  static auto& logged = *new std::set<std::string>;
  constexpr std::size_t most_kept = 4096;  // then they come again
  {
    std::lock_guard lock(mutex);
    if (logged.size() == most_kept) logged.clear();
    if (!logged.insert(text).second) return;
  }
  log(LogLevel::info, text);
}

// The specification that goes first, with its source; none if nothing is set.
struct Choice {
  std::optional<AttentionSpec> spec;
  std::string source;
};

Choice choose(const Request& request, const AttentionConfig& config) {
  const auto entry = [&](const std::string& role) {
    const auto found = config.per_role.find(role);
    return found == config.per_role.end() ? std::nullopt : std::optional(found->second);
  };
  if (const auto spec = entry(request.role))
    return {spec, fmt::format("attention_config.per_role['{}']", request.role)};
  if (const auto spec = entry(request.category)) {
    return {spec, fmt::format("attention_config.per_role['{}'] (role_category fallback)", request.category)};
  }
  if (config.default_spec) return {config.default_spec, "attention_config.default"};
  if (const auto name = environment(Env::DIFFUSION_ATTENTION_BACKEND); name && upper_case(*name) != "AUTO") {
    return {AttentionSpec{.backend = upper_case(*name)}, "attention_config.default (DIFFUSION_ATTENTION_BACKEND)"};
  }
  return {std::nullopt, "platform default"};
}

Selection explicit_selection(const Request& request, AttentionSpec spec) {
  const Enum member = Enum::from_name(spec.backend);
  Selection selection{.member = member, .backend = member.get_class(), .spec = std::move(spec), .is_explicit = true};
  selection.backend->validate_available();
  if (request.head_size != kHeadSizeUnknown && !selection.backend->supports_head_size(request.head_size)) {
    throw ValueError(fmt::format(
        "{} was explicitly selected but head_size={} is unsupported. Supported head sizes: {}. Select TORCH_SDPA or "
        "another backend.",
        member.name(), request.head_size, selection.backend->capabilities().head_sizes.describe()));
  }
  return selection;
}

[[noreturn]] void throw_no_candidate(const Request& request, const std::vector<std::string>& refusals) {
  throw ValueError(fmt::format("No backend of the platform's defaults for device '{}' takes this problem:\n  - {}",
                               request.device, fmt::join(refusals, "\n  - ")));
}

// The platform's candidates that are available and take the head size; why the others do not is logged once.
std::vector<Candidate> usable_candidates(const Request& request, std::vector<std::string>& refusals) {
  std::vector<Candidate> candidates;
  for (const Enum member : platform_candidates(request.device)) {
    try {
      Candidate candidate{.member = member, .backend = member.get_class()};
      candidate.backend->validate_available();
      if (request.head_size != kHeadSizeUnknown && !candidate.backend->supports_head_size(request.head_size)) {
        throw ValueError(fmt::format("does not support head_size={}. Supported head sizes: {}.", request.head_size,
                                     candidate.backend->capabilities().head_sizes.describe()));
      }
      candidates.push_back(std::move(candidate));
    } catch (const Error& error) {
      refusals.push_back(fmt::format("{}: {}", member.name(), error.message()));
      log_once(fmt::format("Platform default passes over {}", refusals.back()));
    }
  }
  if (candidates.empty()) throw_no_candidate(request, refusals);
  return candidates;
}

// The platform's default: one class over its candidates, or, for a problem that is known, the one that takes it.
Selection default_selection(const Request& request, const Problem* problem) {
  std::vector<std::string> refusals;
  const std::vector<Candidate> candidates = usable_candidates(request, refusals);
  if (problem == nullptr) return {.member = candidates.front().member, .backend = default_backend(candidates)};
  const std::size_t unusable = refusals.size();
  const std::size_t chosen = first_that_takes(candidates, *problem, refusals);
  if (chosen == candidates.size()) throw_no_candidate(request, refusals);
  for (std::size_t i = 0; i < chosen; ++i) {
    log_once(fmt::format("Platform default passes over {}: {}", candidates[i].member.name(), refusals[unusable + i]));
  }
  return {.member = candidates[chosen].member, .backend = candidates[chosen].backend};
}

Selection select(const Request& request, const AttentionConfig& config, const Problem* problem) {
  Choice choice = choose(request, config);
  Selection selection =
      choice.spec ? explicit_selection(request, std::move(*choice.spec)) : default_selection(request, problem);
  selection.source = std::move(choice.source);
  log_once(fmt::format("Resolved diffusion attention backend '{}' for role={} via {}", selection.member.name(),
                       request.role.empty() ? "None" : fmt::format("'{}'", request.role), selection.source));
  return selection;
}

// The member's answer, whatever is wrong with it. `first`, the candidate whose causal rule holds, is this one if none
// yet.
MemberVerdict ask(Enum member, const Problem& problem, std::optional<Candidate>& first) {
  MemberVerdict answer{.member = member};
  try {
    answer.backend = member.get_class();
    answer.backend->validate_available();
    const Candidate candidate{.member = member, .backend = answer.backend};
    if (!first) first = candidate;
    answer.verdict = verdict_on(candidate, *first, problem);
    if (answer.verdict) answer.kernel = answer.backend->kernel_name(problem);
  } catch (const tvm::ffi::Error& error) {  // of any language
    answer.verdict.reasons.push_back(std::string(error.message()));
  }
  return answer;
}

}  // namespace

Explanation explain(const Problem& problem, const std::string& role, const AttentionConfig& config,
                    const std::string& role_category) {
  const std::string device(device_type_name(problem.device));
  const Choice choice =
      choose({.role = role, .category = role_category, .head_size = problem.head_size, .device = device}, config);
  Explanation explanation{.source = choice.source, .is_explicit = choice.spec.has_value(), .members = {}, .chosen = {}};
  std::vector<Enum> order =
      choice.spec ? std::vector{Enum::from_name(choice.spec->backend)} : platform_candidates(device);
  const std::size_t candidates = order.size();
  for (const Enum member : Enum::members()) {
    if (std::ranges::find(order, member) == order.end()) order.push_back(member);
  }
  std::optional<Candidate> first;
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (i >= candidates && choice.spec) first.reset();  // the others go by their own rules
    MemberVerdict& answer = explanation.members.emplace_back(ask(order[i], problem, first));
    answer.is_candidate = i < candidates;
    if (answer.is_candidate && answer.verdict && !explanation.chosen) explanation.chosen = order[i];
  }
  return explanation;
}

Selection get_attn_backend_for_role(const std::string& role, std::int64_t head_size, const AttentionConfig& config,
                                    const std::string& role_category, const std::string& device) {
  return select({.role = role, .category = role_category, .head_size = head_size, .device = device}, config, nullptr);
}

Selection select_backend(const Problem& problem, const std::string& role, const AttentionConfig& config,
                         const std::string& role_category) {
  return select({.role = role,
                 .category = role_category,
                 .head_size = problem.head_size,
                 .device = std::string(device_type_name(problem.device))},
                config, &problem);
}

}  // namespace ditattn
