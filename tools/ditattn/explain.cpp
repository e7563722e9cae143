// `ditattn explain`: which backend would compute a problem, and what speaks against each of the others.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "ditattn/selector.hpp"
#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/model_cases.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/selection_flags.hpp"
#include "tools/ditattn/table.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

struct Options {
  std::vector<std::string> shapes;
  std::vector<std::string> models;
  std::string dtype = "float32";
  std::string device = "cpu";
  std::string mask = "none";
  std::int64_t kv_heads = 0;
  bool causal = false;
  bool lse = false;
  std::optional<double> max_error;
  std::string backend;
  SelectionFlags selection;
  bool json = false;
};

struct Explained {
  std::string name;
  Problem problem;
  Explanation explanation;
};

Problem problem_of(const std::string& text, const Options& options, DLDevice device) {
  const std::vector<std::int64_t> shape = parse_shape(text);
  const std::int64_t kv_heads = options.kv_heads == 0 ? shape[1] : options.kv_heads;
  if (shape[1] % kv_heads != 0) {
    throw UsageError(
        fmt::format("--kv-heads {} does not divide the {} heads of --shape {}.", kv_heads, shape[1], text));
  }
  return {.batch = shape[0],
          .num_heads = shape[1],
          .num_kv_heads = kv_heads,
          .seq_q = shape[2],
          .seq_kv = shape[3],
          .head_size = shape[4],
          .dtype = parse_float_dtype(options.dtype),
          .device = device,
          .mask = parse_mask_kind(options.mask),
          .causal = options.causal,
          .lse = options.lse};
}

// A role of the catalogue is asked for under its own name and category, unless the flags give others.
std::vector<Explained> explain_all(const Options& options, AttentionConfig config) {
  if (!options.backend.empty()) config.default_spec = AttentionSpec{.backend = parse_member(options.backend).name()};
  if (options.max_error) {
    if (!config.default_spec) config.default_spec.emplace();
    if (!config.default_spec->is_automatic()) {
      throw UsageError(
          fmt::format("--max-error bounds the automatic choice, but {} is chosen.", config.default_spec->backend));
    }
    config.default_spec->max_error = options.max_error;
  }
  if (options.shapes.empty() && options.models.empty()) {
    throw UsageError("Nothing to explain: give --shape B,H,Sq,Skv,D or --model NAME.");
  }
  const DLDevice device = parse_device(options.device);
  std::vector<Explained> all;
  for (const std::string& shape : options.shapes) {
    const Problem problem = problem_of(shape, options, device);
    all.push_back({shape, problem, explain(problem, options.selection.role, config, options.selection.role_category)});
  }
  for (const std::string& model : options.models) {
    for (const ModelProblem& entry : parse_model_problems(model)) {
      Problem problem = to_problem(entry.role, parse_float_dtype(options.dtype), device);
      problem.lse = options.lse;
      const bool named = !options.selection.role.empty();
      all.push_back({entry.name, problem,
                     explain(problem, named ? options.selection.role : entry.role.role, config,
                             named ? options.selection.role_category : entry.role.category)});
    }
  }
  if (!options.backend.empty()) {
    for (Explained& entry : all) entry.explanation.source = "--backend";
  }
  return all;
}

std::string engine_of(const MemberVerdict& answer) {
  return answer.backend ? answer.backend->capabilities().engine : std::string();
}

Json to_json(const Explained& entry) {
  const Problem& problem = entry.problem;
  const Explanation& explanation = entry.explanation;
  Json backends = Json::array();
  for (const MemberVerdict& answer : explanation.members) {
    backends.push_back({{"backend", answer.member.name()},
                        {"candidate", answer.is_candidate},
                        {"accepted", static_cast<bool>(answer.verdict)},
                        {"engine", engine_of(answer)},
                        {"kernel", answer.kernel},
                        {"median_ms", answer.tuned ? Json(answer.tuned->median_ms) : Json(nullptr)},
                        {"error", answer.tuned ? Json(answer.tuned->error) : Json(nullptr)},
                        {"reasons", answer.verdict.reasons}});
  }
  return {{"case", entry.name},
          {"shape", {problem.batch, problem.num_heads, problem.seq_q, problem.seq_kv, problem.head_size}},
          {"num_kv_heads", problem.num_kv_heads},
          {"dtype", dtype_name(problem.dtype)},
          {"device", device_name(problem.device)},
          {"mask", mask_kind_name(problem.mask)},
          {"causal", problem.causal},
          {"lse", problem.lse},
          {"joint", problem.joint},
          {"source", explanation.source},
          {"explicit", explanation.is_explicit},
          {"chosen", explanation.chosen ? Json(explanation.chosen->name()) : Json(nullptr)},
          {"why", explanation.why},
          {"backends", backends}};
}

// What computes, or what speaks against it; of a class that cannot be had, without the places looked in.
std::string detail_of(const MemberVerdict& answer) {
  if (!answer.backend) return short_reason(answer.verdict.text());
  if (!answer.verdict) return answer.verdict.text();
  return answer.kernel.empty() ? engine_of(answer) : answer.kernel;
}

std::string text_of(const Explained& entry) {
  const Explanation& explanation = entry.explanation;
  Table table{.columns = {{"backend"},
                          {"tried"},
                          {"answer"},
                          {"tuned ms", true},
                          {"error", true},
                          {"engine or kernel, or what speaks against it"}},
              .rows = {}};
  std::size_t turn = 0;
  for (const MemberVerdict& answer : explanation.members) {
    const bool is_chosen = explanation.chosen == answer.member;
    const Emphasis emphasis = is_chosen ? Emphasis::good : answer.verdict ? Emphasis::none : Emphasis::faint;
    table.rows.push_back({{answer.member.name(), emphasis},
                          {answer.is_candidate ? std::to_string(++turn) : ""},
                          {is_chosen        ? "chosen"
                           : answer.verdict ? "would do"
                                            : "refuses",
                           emphasis},
                          {answer.tuned ? fmt::format("{:.4g}", answer.tuned->median_ms) : ""},
                          {answer.tuned ? fmt::format("{:.1e}", answer.tuned->error) : ""},
                          {printable(detail_of(answer))}});
  }
  return fmt::format("{}: {}\nby {}{}{}\n{}", printable(entry.name), describe(entry.problem), explanation.source,
                     explanation.why.empty() ? "" : "; ", explanation.why, format_table(table, use_colour()));
}

int run(const Options& options) {
  const std::vector<Explained> all = explain_all(options, parse_selection(options.selection));
  if (options.json) {
    Json cases = Json::array();
    for (const Explained& entry : all) cases.push_back(to_json(entry));
    print_json({{"cases", cases}});
  } else {
    std::vector<std::string> texts(all.size());
    std::ranges::transform(all, texts.begin(), text_of);
    print(fmt::format("{}", fmt::join(texts, "\n")));
  }
  return kDone;
}

}  // namespace

void add_explain_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand("explain", "Tell which backend would compute a problem, and why not the others");
  auto options = std::make_shared<Options>();
  verb->add_option("--shape", options->shapes, "B,H,Sq,Skv,D; may be given several times");
  verb->add_option("--model", options->models,
                   "A model's problems: NAME[@RESOLUTION][:ROLE], as `ditattn models` has it");
  verb->add_option("--dtype", options->dtype, "float32, float16 or bfloat16")->capture_default_str();
  verb->add_option("--device", options->device, "cpu or cuda")->capture_default_str();
  verb->add_option("--mask", options->mask, "Of --shape: its kind")
      ->capture_default_str()
      ->check(CLI::IsMember({"none", "padding", "bool", "additive"}));
  verb->add_option("--kv-heads", options->kv_heads, "Of --shape: heads of key and value (default: H)")
      ->check(CLI::PositiveNumber);
  verb->add_flag("--causal", options->causal, "Of --shape: queries do not see later keys");
  verb->add_flag("--lse", options->lse, "The log-sum-exp is wanted too");
  verb->add_option("--max-error", options->max_error,
                   "Of the automatic choice, where problems were measured: largest error, relative to the output")
      ->check(number_from(0));
  CLI::Option* backend = verb->add_option("--backend", options->backend, "An explicit choice, in any case");
  add_selection_flags(*verb, *backend, options->selection);
  add_json_flag(*verb, options->json);
  verb->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace ditattn::cli
