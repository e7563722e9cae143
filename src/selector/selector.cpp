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
#include "selector/choice.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;

// Passes each text on once: a model has hundreds of layers.
void log_once(LogLevel level, const std::string& text) {
  static std::mutex mutex;
  static auto& logged = *new std::set<std::string>;
  constexpr std::size_t most_kept = 4096;  // then they come again
  {
    std::lock_guard lock(mutex);
    if (logged.size() == most_kept) logged.clear();
    if (!logged.insert(text).second) return;
  }
  log(level, text);
}

[[noreturn]] void throw_no_candidate(const Request& request, const DispatchRules& rules,
                                     const std::vector<std::string>& refusals) {
  throw ValueError(fmt::format("No backend of {} for device '{}' takes this problem:\n  - {}",
                               rules.subject == kPlatformDefault ? "the platform's defaults" : "what was chosen",
                               request.device, fmt::join(refusals, "\n  - ")));
}

bool may_be_replaced(const AttentionSpec& spec) {
  return spec.is_automatic() || spec.on_unusable.value_or(OnUnusable::error) != OnUnusable::error;
}

// Whether measurements may name somebody beside the platform's order.
bool may_be_measured(const std::string& device) {
  if (current_tune_mode() == TuneMode::online) return true;
  if (device != "cpu" && device != "cuda") return false;
  return tuned_table(device == "cpu" ? kCpu : DLDevice{kDLCUDA, 0}) != nullptr;
}

// What speaks against a member here, logged once; the candidate otherwise.
std::optional<Candidate> usable_candidate(Enum member, const Request& request, const DispatchRules& rules,
                                          std::vector<std::string>& refusals) {
  try {
    Candidate candidate = candidate_of(member);
    if (request.head_size != kHeadSizeUnknown && !candidate.backend->supports_head_size(request.head_size)) {
      throw ValueError(fmt::format("does not support head_size={}. Supported head sizes: {}.", request.head_size,
                                   candidate.backend->capabilities().head_sizes.describe()));
    }
    return candidate;
  } catch (const Error& error) {
    refusals.push_back(fmt::format("{}: {}", member.name(), error.message()));
    log_once(rules.level, fmt::format("{} passes over {}", rules.subject, refusals.back()));
    return std::nullopt;
  }
}

// The class over the rules' candidates, or, for a problem that is known, the one that takes it.
Selection dispatched(const Request& request, DispatchRules rules, const Problem* problem) {
  if (problem == nullptr) {
    const Enum first = rules.in_order.front().member;
    return {.member = first, .backend = default_backend(std::move(rules))};
  }
  const DispatchChoice choice = choose(rules, *problem, table_for(rules, problem->device).get());
  if (!choice.index) throw_no_candidate(request, rules, choice.refusals);
  for (std::size_t i = 0; i < choice.refusals.size() && i < *choice.index; ++i) {
    log_once(rules.level,
             fmt::format("{} passes over {}: {}", rules.subject, rules.at(i).member.name(), choice.refusals[i]));
  }
  const Candidate& chosen = rules.at(*choice.index);
  return {.member = chosen.member, .backend = chosen.backend};
}

Selection explicit_selection(const Request& request, const AttentionSpec& spec, const Problem* problem) {
  const Enum member = Enum::from_name(spec.backend);
  if (may_be_replaced(spec)) return dispatched(request, rules_of(request, spec), problem);
  Candidate candidate = candidate_of(member);
  if (request.head_size != kHeadSizeUnknown && !candidate.backend->supports_head_size(request.head_size)) {
    throw ValueError(fmt::format(
        "{} was explicitly selected but head_size={} is unsupported. Supported head sizes: {}. Select TORCH_SDPA or "
        "another backend.",
        member.name(), request.head_size, candidate.backend->capabilities().head_sizes.describe()));
  }
  return {.member = member, .backend = std::move(candidate.backend)};
}

Selection select(const Request& request, const AttentionConfig& config, const Problem* problem) {
  Choice choice = choose(request, config);
  const AttentionSpec spec = choice.spec.value_or(AttentionSpec());
  Selection selection = spec.is_automatic() ? dispatched(request, rules_of(request, spec), problem)
                                            : explicit_selection(request, spec, problem);
  selection.is_explicit = !spec.is_automatic();
  selection.spec = std::move(choice.spec);
  selection.source = std::move(choice.source);
  log_once(LogLevel::info,
           fmt::format("Resolved diffusion attention backend '{}' for role={} via {}", selection.member.name(),
                       request.role.empty() ? "None" : fmt::format("'{}'", request.role), selection.source));
  return selection;
}

}  // namespace

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
  if (config.default_spec && !config.default_spec->is_automatic()) {
    return {config.default_spec, "attention_config.default"};
  }
  if (const auto name = environment(Env::DIFFUSION_ATTENTION_BACKEND); name && upper_case(*name) != "AUTO") {
    return {AttentionSpec{.backend = upper_case(*name)}, "attention_config.default (DIFFUSION_ATTENTION_BACKEND)"};
  }
  if (config.default_spec) return {config.default_spec, "attention_config.default"};
  return {std::nullopt, "platform default"};
}

std::vector<Enum> order_of(const Request& request, const AttentionSpec& spec) {
  std::vector<Enum> allowed;
  for (const std::string& name : spec.allowed) allowed.push_back(Enum::from_name(name));
  if (spec.is_automatic()) {
    std::vector<Enum> order = platform_candidates(request.device);
    std::erase_if(order,
                  [&](Enum member) { return !allowed.empty() && std::ranges::find(allowed, member) == allowed.end(); });
    return order.empty() ? allowed : order;
  }
  std::vector<Enum> order{Enum::from_name(spec.backend)};
  if (!may_be_replaced(spec)) return order;
  for (const Enum other : allowed.empty() ? platform_candidates(request.device) : allowed) {
    if (std::ranges::find(order, other) == order.end()) order.push_back(other);
  }
  return order;
}

DispatchRules rules_of(const Request& request, const AttentionSpec& spec) {
  DispatchRules rules;
  rules.level = spec.on_unusable == OnUnusable::warn ? LogLevel::warning : LogLevel::info;
  rules.max_error = spec.max_error;
  rules.is_measured = spec.is_automatic();
  if (!spec.is_automatic()) rules.subject = fmt::format("The choice of {}", spec.backend);
  std::vector<std::string> refusals;
  for (const Enum member : order_of(request, spec)) {
    if (auto candidate = usable_candidate(member, request, rules, refusals)) {
      rules.in_order.push_back(std::move(*candidate));
    }
  }
  if (rules.in_order.empty()) throw_no_candidate(request, rules, refusals);
  if (spec.is_automatic() && may_be_measured(request.device)) {
    rules.measured_only = available_beside(rules.in_order);
    std::erase_if(rules.measured_only, [&](const Candidate& candidate) {
      return !spec.allowed.empty() && std::ranges::find(spec.allowed, candidate.member.name()) == spec.allowed.end();
    });
  }
  if (spec.is_automatic() && spec.on_unusable == OnUnusable::error)
    rules.in_order.erase(rules.in_order.begin() + 1, rules.in_order.end());
  return rules;
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
