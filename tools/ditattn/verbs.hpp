#pragma once

#include <CLI/CLI.hpp>

#include <functional>
#include <string>
#include <vector>

namespace ditattn::cli {

/// What the parsed command line asks for; returns the exit status.
using Action = std::function<int()>;

// Each verb adds its subcommand to `app`. Parsing a command line with that verb stores what to do in `action`. `words`
// are the command line, the program first.
void add_list_verb(CLI::App& app, Action& action);
void add_info_verb(CLI::App& app, Action& action);
void add_run_verb(CLI::App& app, Action& action);
void add_models_verb(CLI::App& app, Action& action);
void add_compare_verb(CLI::App& app, Action& action, const std::vector<std::string>& words);
void add_explain_verb(CLI::App& app, Action& action);
void add_plan_verb(CLI::App& app, Action& action);
void add_tune_verb(CLI::App& app, Action& action);
void add_doctor_verb(CLI::App& app, Action& action);

}  // namespace ditattn::cli
