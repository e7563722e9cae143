#include "ditattn/selector.hpp"

#include <fmt/format.h>

#include "core/environment.hpp"
#include "core/text.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"

namespace ditattn {
namespace {

Selection chosen(DiffusionAttentionBackendEnum member, std::string source, bool is_explicit) {
  Selection selection{
      .member = member, .backend = member.get_class(), .source = std::move(source), .is_explicit = is_explicit};
  selection.backend->validate_available();
  log(LogLevel::info, fmt::format("Using diffusion attention backend '{}' ({})", member.name(), selection.source));
  return selection;
}

}  // namespace

std::vector<DiffusionAttentionBackendEnum> platform_candidates(const std::string& device) {
  using enum_type = DiffusionAttentionBackendEnum;
  if (device == "cpu") return {enum_type::FLASH_ATTN, enum_type::TORCH_SDPA};
  throw ValueError(fmt::format("Unknown device '{}'. Valid devices are: cpu", device));
}

Selection select_backend(const Problem& problem) {
  if (const auto name = environment(Env::DIFFUSION_ATTENTION_BACKEND); name && upper_case(*name) != "AUTO") {
    return chosen(DiffusionAttentionBackendEnum::from_name(upper_case(*name)), "DIFFUSION_ATTENTION_BACKEND", true);
  }
  std::string refusals;
  for (const DiffusionAttentionBackendEnum member : platform_candidates(device_name(problem.device))) {
    std::string reason;
    try {
      const Verdict verdict = member.get_class()->explain(problem);
      if (verdict) return chosen(member, "platform default", false);
      reason = verdict.text();
    } catch (const Error& error) {
      reason = error.message();
    }
    log(LogLevel::info, fmt::format("Platform default passes over {}: {}", member.name(), reason));
    refusals += fmt::format("\n  - {}: {}", member.name(), reason);
  }
  throw ValueError("No backend of the platform's defaults takes this problem:" + refusals);
}

}  // namespace ditattn
