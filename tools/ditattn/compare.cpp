// `ditattn compare`: every backend on the same problems, how fast and how exact.

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <ostream>

#include "core/atomic_file.hpp"
#include "ditattn/errors.hpp"
#include "tools/ditattn/case_flags.hpp"
#include "tools/ditattn/command_line.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/html_report.hpp"
#include "tools/ditattn/measure.hpp"
#include "tools/ditattn/progress.hpp"
#include "tools/ditattn/ranks.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CaseFlags cases;
  std::string device = "cpu";
  std::string backends;
  std::string report;
  std::optional<std::string> degrees;  // of --parallel
  double timeout_s = parallel::kDefaultTimeout.count();
  std::vector<std::string> pictures;
  MeasureOptions measure;
  bool all_cases = false;
  bool json = false;
};

// What the flags ask for, checked before any problem's tensors are made.
struct Plan {
  std::vector<CaseSource> cases;
  std::vector<BackendInfo> backends;
  std::vector<Picture> pictures;
  DLDevice device = kCpu;
  bool named = false;  // by --backends
};

// The capture of a real model that ditattn ships: where it is installed, or where the build put a link to it, both seen
// from this library.
fs::path shipped_capture() {
  Dl_info library{};
  ::dladdr(reinterpret_cast<const void*>(&ditattn_command), &library);
  std::error_code error;
  const fs::path file = fs::canonical(library.dli_fname, error);
  const fs::path places[] = {file.parent_path() / DITATTN_DATA_FROM_LIB / "capture.safetensors",
                             file.parent_path() / "../share/ditattn/capture.safetensors"};
  for (const fs::path& place : places) {
    if (fs::exists(place, error)) return place;
  }
  throw FileError(
      fmt::format("The shipped capture, the default input, is missing; looked for '{}' and '{}'. Give "
                  "--input FILE, --model NAME or --shape B,H,Sq,Skv,D.",
                  places[0].string(), places[1].string()));
}

Plan make_plan(const Options& options) {
  Plan plan;
  check_thread_count();
  plan.named = !options.backends.empty();
  const auto members = plan.named ? parse_members(options.backends) : DiffusionAttentionBackendEnum::members();
  plan.device = parse_device(options.device);
  if (!options.pictures.empty() && options.report.empty()) {
    throw UsageError("--picture shows a picture in a report: give --report FILE too.");
  }
  for (const std::string& picture : options.pictures) plan.pictures.push_back(load_picture(picture));
  for (const DiffusionAttentionBackendEnum member : members) {
    // An explicit choice that cannot be had is an error, not a line in a table.
    if (plan.named) member.get_class()->validate_available();
    plan.backends.push_back(inspect(member));
  }
  CaseFlags flags = options.cases;
  if (flags.inputs.empty() && flags.shapes.empty() && flags.models.empty()) {
    flags.inputs.push_back(shipped_capture().string());
  }
  plan.cases = case_sources(flags, plan.device);
  return plan;
}

Comparison measure(const Plan& plan, const MeasureOptions& options, SharedCases& cases, RankLeader* ranks) {
  Comparison comparison{.machine = this_machine(), .cases = {}, .max_error = options.max_error};
  if (ranks != nullptr) {
    comparison.ranks = {.mesh = ranks->mesh(), .kind = is_mpi_job() ? "MPI processes" : "threads of one process"};
  }
  Progress progress(static_cast<std::int64_t>(plan.cases.size()));
  for (std::size_t i = 0; i < plan.cases.size(); ++i) {
    const auto report = [&](std::string_view step) {
      progress.update(static_cast<std::int64_t>(i), fmt::format("{}: {}", plan.cases[i].name, step));
    };
    if (ranks != nullptr) ranks->open(i);
    comparison.cases.push_back(measure_case(*cases.get(i), plan.backends, options, ranks, report));
  }
  return comparison;
}

// Of the dtypes that occur, in their order.
Ceilings ceilings_for(const Comparison& comparison, DLDevice device) {
  std::vector<DLDataType> dtypes;
  for (const CaseResult& result : comparison.cases) {
    if (std::ranges::find(dtypes, result.problem.dtype) == dtypes.end()) dtypes.push_back(result.problem.dtype);
  }
  return measure_ceilings(device, dtypes);
}

// Backends named by --backends have to do what was asked, on all ranks too; each that did not is told on stderr.
ExitStatus verdict(const Comparison& comparison, const MeasureOptions& options) {
  bool exceeded = false;
  bool refused = false;
  bool failed = false;
  const auto judge = [&](const CaseResult& result, const BackendResult& entry, const std::string& where) {
    const bool too_far = options.max_error && entry.accuracy && !is_within(entry, *options.max_error);
    if (entry.status == Status::ok && !too_far) return;
    exceeded |= too_far;
    refused |= entry.status == Status::unsupported;
    failed |= entry.status == Status::failed;
    print_error(fmt::format("{} on {}{}: {}", entry.backend, result.name, where, entry.reason));
  };
  for (const CaseResult& result : comparison.cases) {
    for (const BackendResult& entry : result.results) judge(result, entry, "");
    for (std::size_t i = 0; i < result.over_ranks.size(); ++i) {
      if (result.results[i].status == Status::ok) judge(result, result.over_ranks[i], " over all ranks");
    }
  }
  if (exceeded) return kErrorExceeded;
  if (refused) return kRefused;
  return failed ? kFailure : kDone;
}

// `ranks`: null without --parallel.
int compare(const Options& options, const Plan& plan, const std::vector<std::string>& words, SharedCases& cases,
            RankLeader* ranks) {
  MeasureOptions measure_options = options.measure;
  measure_options.device = plan.device;
  measure_options.seed = options.cases.seed;
  Comparison comparison = measure(plan, measure_options, cases, ranks);
  if (!options.report.empty()) {
    comparison.ceilings = ceilings_for(comparison, plan.device);
    const std::string page = html_report(comparison, report_context(comparison, words, plan.pictures));
    write_atomically(options.report, "report", [&](std::ostream& stream) { stream << page; });
  }
  if (options.json) {
    print_json(to_json(comparison));
  } else {
    const bool colour = use_colour() && !is_mpi_job();  // a launcher's pipe looks like a terminal
    print(format_comparison(comparison, options.all_cases, colour));
  }
  return plan.named ? verdict(comparison, options.measure) : kDone;
}

int compare(const Options& options, const std::vector<std::string>& words) {
  Plan plan;
  SharedCases cases(plan.cases);
  if (!options.degrees) {
    plan = make_plan(options);
    return compare(options, plan, words, cases, nullptr);
  }
  const parallel::Mesh mesh = parse_degrees(*options.degrees);
  const RankBody body = [&](const std::shared_ptr<parallel::Communicator>& world) {
    const RankWork work{
        .cases = cases, .backends = plan.backends, .device = plan.device, .causal = options.measure.causal};
    return do_rank_work(world, mesh, work,
                        [&](RankLeader& ranks) { return compare(options, plan, words, cases, &ranks); });
  };
  return run_as_ranks(
      mesh, parallel::Seconds(options.timeout_s), [&] { plan = make_plan(options); }, body);
}

}  // namespace

void add_compare_verb(CLI::App& app, Action& action, const std::vector<std::string>& words) {
  CLI::App* verb = app.add_subcommand(
      "compare",
      "Compare backends: speed, and error against a float64 reference (default input: Q/K/V of a real model)");
  auto options = std::make_shared<Options>();
  MeasureOptions& measure = options->measure;
  const auto once_each = [](CLI::Option* option) { option->allow_extra_args(false); };
  add_case_flags(*verb, options->cases);
  verb->add_option("--device", options->device, "cpu or cuda")->capture_default_str();
  verb->add_option("--backends", options->backends, "A,B: these only; each must then do every case (default: all)");
  verb->add_option("--max-error", measure.max_error, "Largest rel_l2 allowed (default: what the dtype allows)")
      ->check(number_from(0));
  verb->add_flag("--causal", measure.causal, "Queries do not see later keys, as each backend aligns them");
  verb->add_option("--repeats", measure.repeats, "Timed rounds (default: about a second's worth, 3 to 50)")
      ->check(CLI::Range(1, 100000));
  verb->add_flag("--all-cases", options->all_cases,
                 "A table for each case, also where a capture has more than eight: then, by layer and level alone");
  verb->add_option("--parallel", options->degrees,
                   "ulysses=U,ring=R or ulysses=U,allgather=A: over that many ranks too, the processes of `mpirun -n N "
                   "ditattn …`, or else threads (docs/parallel.md)");
  verb->add_option("--timeout", options->timeout_s, "Seconds that a rank of --parallel waits for another")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 1e6));
  verb->add_option("--report", options->report, "Write the comparison as a self-contained HTML page too");
  once_each(
      verb->add_option("--picture", options->pictures,
                       "CAPTION=FILE: a picture (PNG, JPEG, GIF, WebP or SVG) to show in the report (repeatable)"));
  add_json_flag(*verb, options->json);
  verb->callback([&action, options, words] { action = [options, words] { return compare(*options, words); }; });
}

}  // namespace ditattn::cli
