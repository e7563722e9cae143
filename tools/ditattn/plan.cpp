// `ditattn plan`: what an attention would take over several GPUs, mesh by mesh, from measured figures.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <fstream>
#include <iterator>

#include "ditattn/planner.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/model_cases.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/plan_check.hpp"
#include "tools/ditattn/table.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

using planner::Figures;
using planner::MeshPlan;
using planner::Request;

struct Options {
  std::vector<std::string> shapes;
  std::vector<std::string> models;
  std::int64_t kv_heads = 0;
  bool causal = false;
  Request request = {.gpus = 8};
  std::string figures;
  std::string check;
  bool json = false;
};

struct Planned {
  std::string name;
  Request request;
  planner::Plan plan;
};

Figures figures_of(const std::string& file) {
  if (file.empty()) return planner::figures();
  std::ifstream stream(file);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (!stream) throw FileError(fmt::format("Cannot read the figures '{}'.", file));
  try {
    return planner::parse_figures(text);
  } catch (const ValueError& error) {
    throw FileError(fmt::format("'{}': {}", file, error.message()));
  }
}

std::vector<Planned> requests_of(const Options& options) {
  if (options.shapes.empty() && options.models.empty()) {
    throw UsageError("Nothing to plan: give --shape B,H,Sq,Skv,D or --model NAME (`ditattn models` lists them).");
  }
  std::vector<Planned> all;
  for (const std::string& text : options.shapes) {
    const std::vector<std::int64_t> shape = parse_shape(text);
    Request request = options.request;
    request.problem = {.batch = shape[0],
                       .num_heads = shape[1],
                       .num_kv_heads = options.kv_heads == 0 ? shape[1] : options.kv_heads,
                       .seq_q = shape[2],
                       .seq_kv = shape[3],
                       .head_size = shape[4]};
    all.push_back({text, request, {}});
  }
  for (const std::string& model : options.models) {
    for (const ModelProblem& problem : parse_model_problems(model)) {
      Request request = options.request;
      request.problem = to_problem(problem.role, kBFloat16, kCpu);
      request.joint_tokens = problem.role.joint_tokens;
      request.joint_first = problem.role.joint != JointStrategy::rear;
      all.push_back({problem.name, request, {}});
    }
  }
  for (Planned& planned : all) {
    planned.request.problem.dtype = kBFloat16;
    planned.request.problem.causal = options.causal;
  }
  return all;
}

std::vector<Planned> plan_all(const Options& options, const Figures& figures) {
  std::vector<Planned> all = requests_of(options);
  for (Planned& planned : all) {
    try {
      planned.plan = make_plan(planned.request, figures);
    } catch (const ValueError& error) {
      throw UsageError(error.message());
    }
  }
  return all;
}

Json to_json(const MeshPlan& mesh, double one_gpu_ms) {
  return {{"mesh", mesh_name(mesh.mesh)},
          {"ulysses", mesh.mesh.ulysses},
          {"ring", mesh.mesh.ring},
          {"allgather", mesh.mesh.allgather},
          {"ms", mesh.ms},
          {"speed", one_gpu_ms / mesh.ms},
          {"attention_ms", mesh.attention_ms},
          {"copying_ms", mesh.copying_ms},
          {"exchange_ms", mesh.exchange_ms},
          {"sent_bytes", mesh.sent_bytes},
          {"workspace_bytes", mesh.workspace_bytes},
          {"tensor_bytes", mesh.tensor_bytes},
          {"notes", mesh.notes}};
}

Json to_json(const Planned& planned) {
  const Problem& p = planned.request.problem;
  Json meshes = Json::array();
  for (const MeshPlan& mesh : planned.plan.meshes) meshes.push_back(to_json(mesh, planned.plan.one_gpu_ms));
  return {{"problem", planned.name},
          {"shape", {p.batch, p.num_heads, p.seq_q, p.seq_kv, p.head_size}},
          {"kv_heads", p.num_kv_heads},
          {"dtype", dtype_name(p.dtype)},
          {"causal", p.causal},
          {"joint_tokens", planned.request.joint_tokens},
          {"one_gpu_ms", planned.plan.one_gpu_ms},
          {"meshes", std::move(meshes)},
          {"why", explain_best(planned.plan)}};
}

// What the predictions rest on.
std::vector<std::pair<std::string, std::string>> sources_of(const Request& request, const Figures& figures) {
  std::vector<std::pair<std::string, std::string>> sources;
  for (const auto& gpu : figures.gpus) {
    if (gpu.name != request.gpu) continue;
    sources.emplace_back(gpu.name, gpu.source);
    for (const auto& kernel : gpu.kernels) {
      if (kernel.backend == request.backend) sources.emplace_back(kernel.backend, kernel.source);
    }
  }
  for (const auto& link : figures.links) {
    if (link.name != request.link && link.name != figures.node_link) continue;
    sources.emplace_back(fmt::format("{}: {:g} GB/s, {:g} µs", link.name, link.gb_per_s, link.latency_us), link.source);
  }
  return sources;
}

std::string describe(const Planned& planned, const Figures& figures) {
  const Problem& p = planned.request.problem;
  const int gpus = planned.request.gpus;
  const int node = planned.plan.gpus_per_node;
  std::string text = fmt::format("{}: B={} H={} Sq={} Skv={} D={}, {}", planned.name, p.batch, p.num_heads, p.seq_q,
                                 p.seq_kv, p.head_size, dtype_name(p.dtype));
  if (p.num_kv_heads != p.num_heads) text += fmt::format(", {} K/V heads", p.num_kv_heads);
  if (planned.request.joint_tokens > 0) text += fmt::format(", {} of them text", planned.request.joint_tokens);
  if (p.causal) text += ", causal";
  text += fmt::format("; {} {} with {}", gpus, planned.request.gpu, planned.request.backend);
  if (gpus <= node) return gpus == 1 ? text : text + ", joined by " + figures.node_link;
  if (node == 1) return text + ", joined by " + planned.request.link;
  return text + fmt::format(", {} inside nodes of {}, {} between", figures.node_link, node, planned.request.link);
}

Table table_of(const planner::Plan& plan) {
  Table table{.columns = {{"mesh"},
                          {"ms", true},
                          {"speed", true},
                          {"attention ms", true},
                          {"copying ms", true},
                          {"exchange ms", true},
                          {"sent MB", true},
                          {"workspace MB", true},
                          {"tensors MB", true},
                          {"note"}},
              .rows = {}};
  const auto megabytes = [](std::int64_t bytes) { return fmt::format("{:.4g}", static_cast<double>(bytes) * 1e-6); };
  for (const MeshPlan& mesh : plan.meshes) {
    const bool best = &mesh == &plan.meshes.front();
    table.rows.push_back({{mesh_name(mesh.mesh), best ? Emphasis::good : Emphasis::none},
                          {fmt::format("{:.4g}", mesh.ms)},
                          {fmt::format("{:.2f}×", plan.one_gpu_ms / mesh.ms)},
                          {fmt::format("{:.4g}", mesh.attention_ms)},
                          {fmt::format("{:.3g}", mesh.copying_ms)},
                          {fmt::format("{:.3g}", mesh.exchange_ms)},
                          {megabytes(mesh.sent_bytes)},
                          {megabytes(mesh.workspace_bytes)},
                          {megabytes(mesh.tensor_bytes)},
                          {fmt::format("{}", fmt::join(mesh.notes, "; "))}});
  }
  return table;
}

int plan(const Options& options) {
  const Figures figures = figures_of(options.figures);
  if (!options.check.empty()) return check_plans(options.check, options.request, figures, options.json);
  const std::vector<Planned> all = plan_all(options, figures);
  const Request& request = options.request;
  const auto sources = sources_of(request, figures);
  if (options.json) {
    Json problems = Json::array();
    for (const Planned& planned : all) problems.push_back(to_json(planned));
    Json rest = Json::array();
    for (const auto& [what, source] : sources) rest.push_back({{"figure", what}, {"source", source}});
    print_json({{"gpus", request.gpus},
                {"gpu", request.gpu},
                {"backend", request.backend},
                {"link", request.link},
                {"gpus_per_node", all.front().plan.gpus_per_node},
                {"figures", std::move(rest)},
                {"problems", std::move(problems)}});
    return kDone;
  }
  std::string text;
  for (const Planned& planned : all) {
    text += printable(describe(planned, figures)) + "\n" + format_table(table_of(planned.plan), use_colour());
    text += explain_best(planned.plan) + "\n\n";
  }
  text += "Predicted, not measured (docs/planning.md). It rests on:\n";
  for (const auto& [what, source] : sources) text += fmt::format("  {}: {}\n", printable(what), printable(source));
  print(text);
  return kDone;
}

}  // namespace

void add_plan_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand("plan", "Predict what an attention takes over several GPUs, and the best mesh");
  auto options = std::make_shared<Options>();
  Request& request = options->request;
  const auto once_each = [](CLI::Option* option) { option->allow_extra_args(false); };
  once_each(verb->add_option("--model", options->models,
                             "NAME[@RESOLUTION][:ROLE] of `ditattn models` (default: its first resolution, all roles), "
                             "or a short name, wan14b-720p (repeatable)"));
  once_each(verb->add_option("--shape", options->shapes, "B,H,Sq,Skv,D: a problem of this shape (repeatable)"));
  verb->add_option("--kv-heads", options->kv_heads, "K/V heads of --shape (default: H)")->check(number_from(1));
  verb->add_flag("--causal", options->causal, "Queries do not see later keys");
  verb->add_option("--gpus", request.gpus, "How many")->capture_default_str();
  verb->add_option("--link", request.link, "nvlink inside a node, or what joins nodes: ib")->capture_default_str();
  verb->add_option("--gpus-per-node", request.gpus_per_node,
                   "GPUs that nvlink joins (default: 8; 1 for another --link of 8 GPUs or fewer)");
  verb->add_option("--gpu", request.gpu, "The kind of GPU")->capture_default_str();
  verb->add_option("--backend", request.backend, "Whose kernel computes")->capture_default_str();
  verb->add_option("--figures", options->figures, "A JSON file of measured figures (default: the built-in ones)");
  verb->add_option(
      "--check", options->check,
      "A file of measured times, one JSON object a line with gpus, mesh, shape, ms: print predictions beside "
      "them");
  add_json_flag(*verb, options->json);
  verb->callback([&action, options] { action = [options] { return plan(*options); }; });
}

}  // namespace ditattn::cli
