#include "ditattn/planner.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "ditattn/errors.hpp"
#include "planner/times.hpp"

namespace ditattn::planner {
namespace {

using parallel::Mesh;

constexpr int kMostGpus = 1024;

// By name; ValueError with those that there are.
template <class Entry>
const Entry& find(const std::vector<Entry>& entries, std::string Entry::*name, const std::string& wanted,
                  const char* what) {
  const auto found = std::ranges::find(entries, wanted, name);
  if (found != entries.end()) return *found;
  std::vector<std::string> names(entries.size());
  std::ranges::transform(entries, names.begin(), name);
  throw ValueError(fmt::format("There are no figures of the {} '{}'. There are figures of: {}.", what, wanted,
                               fmt::join(names, ", ")));
}

int node_size(const Request& request, const Figures& figures) {
  const bool inside = request.link == figures.node_link;
  const int size =
      request.gpus_per_node.value_or(!inside && request.gpus <= figures.gpus_per_node ? 1 : figures.gpus_per_node);
  if (size < 1) throw ValueError(fmt::format("{} GPUs per node: there must be at least 1.", size));
  if (inside && request.gpus > size) {
    throw ValueError(fmt::format(
        "{} joins the {} GPUs of a node, not {}. Name the link that joins nodes, or give more GPUs per node.",
        request.link, size, request.gpus));
  }
  return size;
}

Machine machine_of(const Request& request, const Figures& figures) {
  if (request.gpus < 1 || request.gpus > kMostGpus) {
    throw ValueError(fmt::format("{} GPUs: there must be 1 to {}.", request.gpus, kMostGpus));
  }
  const GpuFigures& gpu = find(figures.gpus, &GpuFigures::name, request.gpu, "GPU");
  return {.gpu = gpu,
          .kernel = find(gpu.kernels, &KernelFigures::backend, request.backend, "back end"),
          .inside = find(figures.links, &LinkFigures::name, figures.node_link, "link"),
          .between = find(figures.links, &LinkFigures::name, request.link, "link"),
          .gpus_per_node = node_size(request, figures)};
}

Work work_of(const Request& request) {
  const Problem& problem = request.problem;
  const std::int64_t text = request.joint_tokens;
  const std::array sizes = {problem.batch,     problem.num_heads, problem.num_kv_heads,
                            problem.head_size, problem.seq_q,     problem.seq_kv};
  if (std::ranges::min(sizes) < 1 || problem.num_heads % std::max<std::int64_t>(problem.num_kv_heads, 1) != 0) {
    throw ValueError(fmt::format(
        "A problem of batch {}, {} heads, {} K/V heads, head size {}, {} rows and {} keys: all must be at "
        "least 1, and heads a multiple of K/V heads.",
        problem.batch, problem.num_heads, problem.num_kv_heads, problem.head_size, problem.seq_q, problem.seq_kv));
  }
  if (text < 0 || text > std::min(problem.seq_q, problem.seq_kv)) {
    throw ValueError(fmt::format("{} joint tokens of {} rows and {} keys: there must be 0 to {}.", text, problem.seq_q,
                                 problem.seq_kv, std::min(problem.seq_q, problem.seq_kv)));
  }
  return {.batch = problem.batch,
          .heads = problem.num_heads,
          .kv_heads = problem.num_kv_heads,
          .rows = problem.seq_q - text,
          .keys = problem.seq_kv - text,
          .text = text,
          .head_size = problem.head_size,
          .element = problem.dtype.bits / 8,
          .causal = problem.causal,
          .text_first = request.joint_first};
}

// Copies around the exchange of heads, each read and written: query, key and value before, the rows of the result
// after. As they lie nothing is put together, and what stays, or came of parts before the last, is copied meanwhile.
double packing_ms(const Layout& layout, const Machine& machine, int rank, const HeadExchange& heads) {
  if (layout.ranks() == 1) return 0;
  const Work& work = layout.work();
  const double text_ms = machine.copy_ms(2 * layout.bytes(work.text, work.heads));
  if (layout.mesh().ulysses == 1) return machine.copy_ms(2 * layout.copied_keys(rank)) + text_ms;
  if (heads.as_they_lie) {
    const std::int64_t came = layout.bytes(layout.rows(rank), work.heads - layout.heads(layout.column(rank)).query);
    return machine.copy_ms(std::llround(2 * heads.last * static_cast<double>(came))) + text_ms;
  }
  const std::int64_t rows = layout.bytes(layout.rows(rank), work.heads);
  const std::int64_t keys_and_values = 2 * layout.bytes(layout.keys(rank), layout.kv_copies());
  return machine.copy_ms(2 * (rows + keys_and_values)) + machine.copy_ms(2 * rows) + text_ms;
}

std::vector<std::string> notes_on(const Layout& layout, const Machine& machine) {
  const Work& work = layout.work();
  const Mesh& mesh = layout.mesh();
  std::vector<std::string> notes;
  if (work.heads % mesh.ulysses != 0) {
    notes.push_back(fmt::format("heads uneven: {} on the slowest ranks, {:.1f} on average", layout.heads(0).query,
                                static_cast<double>(work.heads) / mesh.ulysses));
  }
  if (layout.kv_copies() > work.kv_heads) {
    notes.push_back(fmt::format("{} K/V heads sent as {}", work.kv_heads, layout.kv_copies()));
  }
  if (work.causal && layout.places() > 1) notes.emplace_back("causal: the last ranks have most to do");
  const int node = machine.gpus_per_node;
  if (mesh.ulysses > 1 && node > 1 && layout.ranks() > node && node % mesh.ulysses != 0) {
    notes.push_back(fmt::format("ulysses crosses nodes of {}", node));
  }
  return notes;
}

MeshPlan plan_mesh(const Work& work, const Mesh& mesh, const Machine& machine) {
  const Layout layout(work, mesh);
  MeshPlan plan{.mesh = mesh, .notes = notes_on(layout, machine)};
  const HeadExchange heads = head_exchange(layout, machine);
  double packing = 0;
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    packing = std::max(packing, packing_ms(layout, machine, rank, heads));
    plan.sent_bytes = std::max(plan.sent_bytes, layout.sent_bytes(rank));
    plan.workspace_bytes = std::max(plan.workspace_bytes, layout.workspace_bytes(rank));
    plan.tensor_bytes = std::max(plan.tensor_bytes, layout.tensor_bytes(rank));
  }
  const Phase phase = compute_phase(layout, machine, heads);
  plan.attention_ms = phase.attention_ms;
  plan.copying_ms = packing + phase.copying_ms;
  const double exposed = phase.ms - phase.attention_ms - phase.copying_ms;
  plan.exchange_ms = exposed < 1e-9 ? 0 : exposed;  // what rounding leaves
  plan.exchange_ms += exchange_ms(layout, machine, &Layout::before, heads.first) +
                      exchange_ms(layout, machine, &Layout::after, heads.last) +
                      exchange_ms(layout, machine, &Layout::text);
  plan.ms = plan.attention_ms + plan.copying_ms + plan.exchange_ms;
  return plan;
}

}  // namespace

Plan make_plan(const Request& request, const Figures& figures) {
  const Machine machine = machine_of(request, figures);
  const Work work = work_of(request);
  Plan plan{.one_gpu_ms = plan_mesh(work, {}, machine).ms, .gpus_per_node = machine.gpus_per_node, .meshes = {}};
  for (const Mesh& mesh : parallel::meshes_of(request.gpus)) plan.meshes.push_back(plan_mesh(work, mesh, machine));
  std::ranges::stable_sort(plan.meshes, {}, &MeshPlan::ms);
  return plan;
}

std::string explain_best(const Plan& plan) {
  const MeshPlan& best = plan.meshes.front();
  std::string text = fmt::format("{}: {:.3g} ms, {:.2f} times as fast as one GPU", mesh_name(best.mesh), best.ms,
                                 plan.one_gpu_ms / best.ms);
  if (best.ms > plan.one_gpu_ms) text += fmt::format(", whose {:.3g} ms no mesh comes to", plan.one_gpu_ms);
  if (plan.meshes.size() == 1) return text + ".";
  const MeshPlan& next = plan.meshes[1];
  text += fmt::format(". {} would take {:.3g} ms more:", mesh_name(next.mesh), next.ms - best.ms);
  const std::array<std::pair<const char*, double MeshPlan::*>, 3> parts = {{{"attention", &MeshPlan::attention_ms},
                                                                            {"copying", &MeshPlan::copying_ms},
                                                                            {"exchange", &MeshPlan::exchange_ms}}};
  for (const auto& [name, part] : parts) {
    text += fmt::format("{} {} {:+.3g} ms", name == parts[0].first ? "" : ",", name, next.*part - best.*part);
  }
  return text + ".";
}

}  // namespace ditattn::planner
