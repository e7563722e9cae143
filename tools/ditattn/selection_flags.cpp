#include "tools/ditattn/selection_flags.hpp"

#include <fmt/format.h>

#include "core/environment.hpp"
#include "core/text.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"

namespace ditattn::cli {
namespace {

constexpr std::string_view kDotted = "--diffusion-attention-config.";
constexpr const char* kSetting = "--diffusion-attention-setting";

void check_members(const AttentionSpec& spec) {
  if (!spec.is_automatic()) parse_member(spec.backend);
  for (const std::string& name : spec.allowed) parse_member(name);
}

}  // namespace

void add_selection_flags(CLI::App& verb, CLI::Option& backend, SelectionFlags& flags) {
  const auto exclusive = [&](CLI::Option* option) { return option->excludes(&backend); };
  exclusive(
      verb.add_option("--diffusion-attention-backend", flags.attention.backend,
                      "The configuration's default, in any case (DIFFUSION_ATTENTION_BACKEND fills it otherwise)"));
  exclusive(verb.add_option("--diffusion-attention-config", flags.attention.config,
                            "Backends by role: JSON, or a file of it: {\"default\": NAME, \"per_role\": {ROLE: NAME}}; "
                            "also dotted, --diffusion-attention-config.per_role.self NAME"));
  exclusive(verb.add_option(kSetting, flags.settings)->group("")->allow_extra_args(false));
  verb.add_option("--role", flags.role, "The layer's role (self, cross, ...): chooses in the configuration");
  verb.add_option("--role-category", flags.role_category, "The role to fall back to in the configuration");
}

AttentionConfig parse_selection(const SelectionFlags& flags) {
  AttentionFlags attention = flags.attention;
  for (const std::string& setting : flags.settings) {
    const std::size_t equals = setting.find('=');
    attention.settings.emplace_back(setting.substr(0, equals), setting.substr(equals + 1));
  }
  AttentionConfig config = config_from_flags(attention);
  if (config.default_spec) check_members(*config.default_spec);
  for (const auto& [role, spec] : config.per_role) check_members(spec);
  const auto name = environment(Env::DIFFUSION_ATTENTION_BACKEND);
  if (name && upper_case(*name) != "AUTO") parse_member(*name);
  return config;
}

std::vector<std::string> rewrite_dotted_flags(int argc, const char* const* argv) {
  std::vector<std::string> arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (!argument.starts_with(kDotted)) {
      arguments.push_back(argument);
      continue;
    }
    std::string setting = argument.substr(kDotted.size());
    if (setting.find('=') == std::string::npos) {
      if (++i == argc) throw UsageError(fmt::format("{} needs a value.", argument));
      setting += fmt::format("={}", argv[i]);
    }
    arguments.insert(arguments.end(), {kSetting, setting});
  }
  return arguments;
}

}  // namespace ditattn::cli
