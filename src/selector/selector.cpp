#include "ditattn/selector.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "core/environment.hpp"
#include "core/interrupt.hpp"
#include "core/log_once.hpp"
#include "core/text.hpp"
#include "ditattn/errors.hpp"
#include "selector/choice.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;

[[noreturn]] void throw_no_candidate(const Request& request, const DispatchRules& rules,
                                     const std::vector<std::string>& refusals) {
  throw ValueError(fmt::format("No backend of {} for device '{}' takes this problem:\n  - {}",
                               rules.subject == kPlatformDefault ? "the platform's defaults" : "what was chosen",
                               request.device, fmt::join(refusals, "\n  - ")));
}

// Whether measurements may name somebody beside the platform's order.
bool may_be_measured(const std::string& device) {
  if (current_tune_mode() == TuneMode::online) return true;
  if (device != "cpu" && device != "cuda") return false;
  return tuned_table(device == "cpu" ? kCpu : DLDevice{kDLCUDA, 0}) != nullptr;
}

std::string name_of(const std::string& role) { return role.empty() ? "None" : fmt::format("'{}'", role); }

// The candidate, or what speaks against the member here.
std::optional<Candidate> usable_candidate(Enum member, const Request& request, std::vector<std::string>& refusals) {
  try {
    Candidate candidate = candidate_of(member);
    if (request.head_size != kHeadSizeUnknown && !candidate.backend->supports_head_size(request.head_size)) {
      throw ValueError(fmt::format("does not support head_size={}. Supported head sizes: {}.", request.head_size,
                                   candidate.backend->capabilities().head_sizes.describe()));
    }
    return candidate;
  } catch (const tvm::ffi::Error& error) {  // of any language
    if (is_interrupt(error)) throw;
    refusals.push_back(fmt::format("{}: {}", member.name(), std::string(error.message())));
    return std::nullopt;
  }
}

// Tells once that somebody else than the first of the order was taken.
void log_move(const Request& request, const DispatchRules& rules, Enum chosen,
              const std::vector<std::string>& reasons) {
  if (reasons.empty()) return;
  if (!rules.is_measured) {
    log_once(rules.level, fmt::format("{} moves on to {} for role={}: {}", rules.subject, chosen.name(),
                                      name_of(request.role), fmt::join(reasons, "; ")));
    return;
  }
  for (const std::string& reason : reasons) {
    log_once(rules.level, fmt::format("{} passes over {}", rules.subject, reason));
  }
}

// The class over the rules' candidates, or, for a problem that is known, the one that takes it.
Selection dispatched(const Request& request, DispatchRules rules, const Problem* problem) {
  if (rules.in_order.empty()) throw_no_candidate(request, rules, rules.passed_over);
  std::vector<std::string> reasons = rules.passed_over;
  if (problem == nullptr) {
    const Enum first = rules.in_order.front().member;
    log_move(request, rules, first, reasons);
    return {.member = first, .backend = default_backend(std::move(rules))};
  }
  const DispatchChoice choice = choose(rules, *problem, table_for(rules, problem->device).get());
  if (!choice.index) throw_no_candidate(request, rules, choice.refusals);
  const Candidate& chosen = rules.at(*choice.index);
  for (std::size_t i = 0; i < choice.refusals.size() && i < *choice.index; ++i) {
    reasons.push_back(fmt::format("{}: {}", rules.at(i).member.name(), choice.refusals[i]));
  }
  log_move(request, rules, chosen.member, reasons);
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
  log_once(LogLevel::info, fmt::format("Resolved diffusion attention backend '{}' for role={} via {}",
                                       selection.member.name(), name_of(request.role), selection.source));
  return selection;
}

}  // namespace

bool may_be_replaced(const AttentionSpec& spec) {
  return spec.is_automatic() || spec.on_unusable.value_or(OnUnusable::error) != OnUnusable::error;
}

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
  allowed.reserve(spec.allowed.size());
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
  rules.is_measured = spec.is_automatic() && spec.on_unusable != OnUnusable::error;
  if (!spec.is_automatic()) rules.subject = fmt::format("The choice of {}", spec.backend);
  for (const Enum member : order_of(request, spec)) {
    if (auto candidate = usable_candidate(member, request, rules.passed_over)) {
      rules.in_order.push_back(std::move(*candidate));
      if (spec.is_automatic() && !rules.is_measured) break;  // the first alone
    }
  }
  if (rules.is_measured && may_be_measured(request.device)) {
    rules.measured_only = available_beside(rules.in_order);
    std::erase_if(rules.measured_only, [&](const Candidate& candidate) {
      return !spec.allowed.empty() && std::ranges::find(spec.allowed, candidate.member.name()) == spec.allowed.end();
    });
  }
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
