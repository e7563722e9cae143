#include "tools/ditattn/command_line.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstdlib>

#include "core/environment.hpp"
#include "ditattn/log.hpp"
#include "ditattn/version.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/selection_flags.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

std::string footer() {
  std::string text = kExitStatusHelp;
  text += "\nEnvironment:\n";
  for (const EnvironmentVariable& variable : environment_variables()) {
    text += fmt::format("  {}\n      {}\n", variable.name, variable.meaning);
  }
  text += "  NO_COLOR\n      Set: no colour, on a terminal either\n";
  return text;
}

spdlog::level::level_enum level_of(LogLevel level) {
  switch (level) {
    case LogLevel::debug:
      return spdlog::level::debug;
    case LogLevel::info:
      return spdlog::level::info;
    case LogLevel::warning:
      return spdlog::level::warn;
    case LogLevel::error:
      break;
  }
  return spdlog::level::err;
}

// The library's messages go to stderr: warnings and errors, and with --verbose what it chose and why.
void install_log(bool verbose) {
  const char* no_colour = std::getenv("NO_COLOR");
  const bool plain = no_colour != nullptr && *no_colour != '\0';
  auto sink = std::make_shared<spdlog::sinks::stderr_color_sink_mt>(plain ? spdlog::color_mode::never
                                                                          : spdlog::color_mode::automatic);
  auto logger = std::make_shared<spdlog::logger>("ditattn", std::move(sink));
  logger->set_pattern("%n: %^%l%$: %v");
  logger->set_level(verbose ? spdlog::level::info : spdlog::level::warn);
  set_log_handler([logger](LogLevel level, std::string_view message) {
    logger->log(level_of(level), spdlog::string_view_t(message.data(), message.size()));
  });
}

// Help and version are "errors" of the parser too, with status 0 and text for stdout.
int report_parse_error(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);
  print_error(fmt::format("{}\nRun `ditattn --help`, or `ditattn VERB --help`.", error.what()));
  return kUsage;
}

std::string verb_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(verb->get_name());
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

int parse_and_do(int argc, char** argv) {
  CLI::App app("Attention for diffusion transformers: one name picks the kernel.", "ditattn");
  app.footer(footer());
  app.set_version_flag("--version", std::string("ditattn ") + DITATTN_VERSION);
  bool verbose = false;
  app.add_flag("-v,--verbose", verbose, "Tell on stderr what is chosen and why");
  std::vector<std::string> registrations;
  app.add_option("--register", registrations,
                 "NAME=package.module.Class: the class behind the backend NAME, or behind a new one (repeatable)")
      ->allow_extra_args(false);
  app.require_subcommand(0, 1);  // none is told below, in words that fit
  app.fallthrough();

  Action action;
  add_list_verb(app, action);
  add_info_verb(app, action);
  add_run_verb(app, action);
  add_compare_verb(app, action, {argv, argv + argc});
  add_models_verb(app, action);
  add_plan_verb(app, action);
  add_tune_verb(app, action);
  add_explain_verb(app, action);
  add_doctor_verb(app, action);
  try {
    std::vector<std::string> arguments = rewrite_dotted_flags(argc, argv);
    std::ranges::reverse(arguments);  // as the parser takes them
    app.parse(std::move(arguments));
  } catch (const CLI::ParseError& error) {
    return report_parse_error(app, error);
  }
  if (!action) throw UsageError(fmt::format("A verb is needed: {}. Run `ditattn --help`.", verb_names(app)));
  install_log(verbose);
  register_backends(registrations);
  return action();
}

}  // namespace

}  // namespace ditattn::cli

int ditattn_command(int argc, char** argv) {
  using namespace ditattn::cli;
  try {
    return parse_and_do(argc, argv);
  } catch (...) {
    const Failure failure = current_failure();
    print_error(failure.message);
    return failure.status;
  }
}
