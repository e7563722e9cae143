// `ditattn tune`: measures which backend is the fastest within an error, and keeps it for those who name none.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ditattn/attention.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/selector.hpp"
#include "ditattn/tuner.hpp"
#include "tools/ditattn/case_flags.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/machine.hpp"
#include "tools/ditattn/progress.hpp"
#include "tools/ditattn/table.hpp"
#include "tools/ditattn/tune_check.hpp"
#include "tools/ditattn/verbs.hpp"
#include "tuner/tune_cache.hpp"

namespace ditattn::cli {
namespace {

struct Options {
  CaseFlags cases;
  std::string device = "cpu";
  std::string backends;
  std::optional<double> max_error;
  double budget_ms = TuneOptions().budget_ms;
  bool catalogue = false;
  std::optional<double> max_tflop;
  bool check = false;
  bool list = false;
  bool json = false;
};

struct Tuned {
  std::string name;  // empty in a listing
  TunedProblem measured;
  std::optional<TuneCheck> check = {};
  std::string skipped = {};  // why it was not measured
};

// Every distinct problem of the catalogue that `check_work` lets through, of at most so many TFLOP.
std::vector<std::string> whole_catalogue(DLDevice device, double max_tflop) {
  std::vector<std::string> names;
  std::vector<Problem> seen;
  double smallest = std::numeric_limits<double>::infinity();
  for (const Model& model : models()) {
    for (const ModelResolution& resolution : model.resolutions) {
      for (const ModelProblem& problem : parse_model_problems(fmt::format("{}@{}", model.name, resolution.name))) {
        smallest = std::min(smallest, tflop(problem.role));
        if (!is_affordable(problem, device) || tflop(problem.role) > max_tflop) continue;
        const Problem posed = to_problem(problem.role, kFloat32, device);
        const auto is_same = [&](const Problem& other) { return same_measurement(other, posed); };
        if (std::ranges::any_of(seen, is_same)) continue;
        seen.push_back(posed);
        names.push_back(problem.name);
      }
    }
  }
  if (names.empty()) {
    throw UsageError(
        fmt::format("--max-tflop {:g} leaves nothing of the catalogue: its smallest problem takes {:.3g} TFLOP a call.",
                    max_tflop, smallest));
  }
  return names;
}

Tuned tune_one(const CaseSource& source, const Options& options, DLDevice device, const TuneOptions& tuning) {
  Tuned tuned{.name = source.name, .measured = {}};
  try {
    Case loaded = source.make();
    const Inputs inputs = device.device_type == kDLCPU ? std::move(loaded.inputs) : inputs_on(loaded.inputs, device);
    const ImplConfig config = config_for(inputs);
    tuned.measured = tune_call(config, inputs.query, inputs.key, inputs.value, inputs.metadata, tuning);
    if (options.check) tuned.check = check_choice(inputs, config, tuned.measured, options.max_error, options.budget_ms);
  } catch (const MemoryError& error) {  // the next may fit
    tuned.skipped = error.message();
  }
  return tuned;
}

std::vector<Tuned> tune_all(const Options& options, DLDevice device) {
  CaseFlags flags = options.cases;
  if (options.catalogue) {
    const std::vector<std::string> all =
        whole_catalogue(device, options.max_tflop.value_or(std::numeric_limits<double>::infinity()));
    flags.models.insert(flags.models.end(), all.begin(), all.end());
  }
  if (flags.shapes.empty() && flags.models.empty() && flags.inputs.empty()) {
    throw UsageError("Nothing to tune: give --shape B,H,Sq,Skv,D, --model NAME, --input FILE or --catalogue.");
  }
  const std::vector<CaseSource> sources = case_sources(flags, device);
  Progress progress(static_cast<std::int64_t>(sources.size()));
  std::vector<Tuned> all;
  for (const CaseSource& source : sources) {
    TuneOptions tuning{.budget_ms = options.budget_ms, .seed = flags.seed};
    if (!options.backends.empty()) tuning.members = parse_members(options.backends);
    tuning.report = [&](std::string_view step) {
      progress.update(static_cast<std::int64_t>(all.size()), fmt::format("{}: {}", source.name, step));
    };
    all.push_back(tune_one(source, options, device, tuning));
  }
  return all;
}

const TunedResult* result_of(const TunedProblem& problem, const std::string& backend) {
  const auto found = std::ranges::find(problem.results, backend, &TunedResult::backend);
  return found == problem.results.end() || !found->reason.empty() ? nullptr : &*found;
}

std::optional<std::string> choice_of(const Tuned& tuned, std::optional<double> max_error) {
  const auto member = tuned_member(tuned.measured.problem, max_error);
  return member ? std::optional(member->name()) : std::nullopt;
}

// The platform's first that could be used: what a default would be without measurements.
const TunedResult* untuned(const TunedProblem& problem) {
  for (const auto member : platform_candidates(std::string(device_type_name(problem.problem.device)))) {
    if (const TunedResult* result = result_of(problem, member.name())) return result;
  }
  return nullptr;
}

Json to_json(const Tuned& tuned, std::optional<double> max_error) {
  const Problem& p = tuned.measured.problem;
  Json results = Json::array();
  for (const TunedResult& result : tuned.measured.results) {
    results.push_back({{"backend", result.backend},
                       {"engine", result.engine},
                       {"median_ms", result.median_ms > 0 ? Json(result.median_ms) : Json(nullptr)},
                       {"error", result.reason.empty() ? Json(result.error) : Json(nullptr)},
                       {"reason", result.reason.empty() ? Json(nullptr) : Json(result.reason)}});
  }
  const auto choice = tuned.skipped.empty() ? choice_of(tuned, max_error) : std::nullopt;
  Json json{{"case", tuned.name},
            {"shape", {p.batch, p.num_heads, p.seq_q, p.seq_kv, p.head_size}},
            {"num_kv_heads", p.num_kv_heads},
            {"dtype", dtype_name(p.dtype)},
            {"mask", mask_kind_name(p.mask)},
            {"causal", p.causal},
            {"joint", p.joint},
            {"chosen", choice ? Json(*choice) : Json(nullptr)},
            {"results", results},
            {"skipped", tuned.skipped.empty() ? Json(nullptr) : Json(tuned.skipped)}};
  if (tuned.check)
    json["check"] = {{"auto_ms", tuned.check->auto_ms},
                     {"best_ms", tuned.check->best_ms},
                     {"ratio", tuned.check->ratio},
                     {"best", tuned.check->best}};
  return json;
}

std::vector<Cell> row(const Tuned& tuned, std::optional<double> max_error) {
  if (!tuned.skipped.empty()) return {{printable(tuned.name)}, {}, {"skipped"}, {}, {}, {}, {}, {tuned.skipped}};
  const auto choice = choice_of(tuned, max_error);
  const TunedResult* chosen = choice ? result_of(tuned.measured, *choice) : nullptr;
  const TunedResult* first = untuned(tuned.measured);
  std::string others;
  for (const TunedResult& result : tuned.measured.results) {
    if (&result == chosen || !result.reason.empty()) continue;
    others += fmt::format("{}{} {:.3g} ms ({:.1e})", others.empty() ? "" : ", ", result.backend, result.median_ms,
                          result.error);
  }
  return {{printable(tuned.name)},
          {describe(tuned.measured.problem)},
          {choice.value_or("none"), choice ? Emphasis::good : Emphasis::bad},
          {chosen ? fmt::format("{:.4g}", chosen->median_ms) : ""},
          {chosen ? fmt::format("{:.1e}", chosen->error) : ""},
          {chosen && first ? fmt::format("{:.2f}", first->median_ms / chosen->median_ms) : ""},
          {tuned.check ? fmt::format("{:.3f}", tuned.check->ratio) : ""},
          {others}};
}

int run(const Options& options) {
  check_thread_count();
  const DLDevice device = parse_device(options.device);
  std::vector<Tuned> all;
  if (options.list) {
    for (TunedProblem& problem : tuned_problems(device)) all.push_back({.name = {}, .measured = std::move(problem)});
  } else {
    all = tune_all(options, device);
  }
  const std::string file = tune_cache_file(device);
  if (options.json) {
    Json cases = Json::array();
    for (const Tuned& tuned : all) cases.push_back(to_json(tuned, options.max_error));
    print_json(
        {{"machine", to_json(this_machine())}, {"device", device_name(device)}, {"file", file}, {"cases", cases}});
    return kDone;
  }
  Table table{.columns = {{"case"},
                          {"problem"},
                          {"choice"},
                          {"median ms", true},
                          {"error", true},
                          {"x default", true},
                          {"auto/best", true},
                          {"others (error)"}},
              .rows = {}};
  for (const Tuned& tuned : all) table.rows.push_back(row(tuned, options.max_error));
  print(fmt::format("{}\n{}{}\n", describe(this_machine()), format_table(table, use_colour()),
                    file.empty() ? "Kept by nobody: there is no cache folder (DITATTN_TUNE_CACHE)."
                                 : fmt::format("{} problem{} in {}", tuned_problems(device).size(),
                                               tuned_problems(device).size() == 1 ? "" : "s", file)));
  return kDone;
}

}  // namespace

void add_tune_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand(
      "tune", "Measure which backend is the fastest within an error, and keep it for defaults (docs/tuning.md)");
  auto options = std::make_shared<Options>();
  add_case_flags(*verb, options->cases);
  CLI::Option* catalogue = verb->add_flag("--catalogue", options->catalogue,
                                          "All problems of `ditattn models` that take seconds here, each once");
  verb->add_option("--max-tflop", options->max_tflop,
                   "Of --catalogue: those only that take at most so many TFLOP a call")
      ->needs(catalogue)
      ->check(number_from(0));
  verb->add_option("--device", options->device, "cpu or cuda")->capture_default_str();
  verb->add_option("--backends", options->backends, "A,B: these only (default: all that can run here)");
  verb->add_option("--max-error", options->max_error,
                   "Largest error of the choice that is shown, relative to the output (default: exact ones only). "
                   "Everybody is measured, so that any bound can be asked for later")
      ->check(number_from(0));
  verb->add_option("--budget", options->budget_ms, "Milliseconds of timed rounds per problem, at least three rounds")
      ->capture_default_str()
      ->check(number_from(0));
  verb->add_flag("--check", options->check, "Then time the default itself beside every backend");
  verb->add_flag("--list", options->list, "Measure nothing: show what is kept");
  add_json_flag(*verb, options->json);
  verb->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace ditattn::cli
