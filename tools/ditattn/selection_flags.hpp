#pragma once

#include <CLI/CLI.hpp>

#include <string>
#include <vector>

#include "ditattn/attention_config.hpp"

namespace ditattn::cli {

/// Flags that say which backend is used where --backend names none: vLLM-Omni's, and the role they are asked for.
struct SelectionFlags {
  AttentionFlags attention;
  std::vector<std::string> settings;  ///< KEY=VALUE
  std::string role;
  std::string role_category;
};

/// Adds them to a verb; `backend` is its --backend, which excludes them.
void add_selection_flags(CLI::App& verb, CLI::Option& backend, SelectionFlags& flags);

/// The configuration they make. ConfigError, and UnknownBackendError for every name in it or in
/// DIFFUSION_ATTENTION_BACKEND, so that nothing is read before all are known.
AttentionConfig parse_selection(const SelectionFlags& flags);

/// vLLM-Omni's dotted flags, `--diffusion-attention-config.KEY VALUE` and `…KEY=VALUE`, as the option the parser knows.
std::vector<std::string> rewrite_dotted_flags(int argc, const char* const* argv);

}  // namespace ditattn::cli
