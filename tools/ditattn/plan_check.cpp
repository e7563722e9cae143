#include "tools/ditattn/plan_check.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/table.hpp"

namespace ditattn::cli {
namespace {

struct Checked {
  std::string mesh;
  std::string shape;
  int gpus;
  double measured_ms;
  double predicted_ms;
};

Checked check_line(const Json& line, planner::Request request, const planner::Figures& figures) {
  for (const auto& [key, value] : line.items()) {
    constexpr const char* known[] = {"gpus", "mesh", "shape", "ms", "kv_heads", "causal", "joint_tokens", "link"};
    if (std::ranges::find(known, key) == std::end(known)) throw ValueError(fmt::format("unknown field '{}'", key));
  }
  for (const char* key : {"gpus", "mesh", "shape", "ms"}) {
    if (!line.contains(key)) throw ValueError(fmt::format("no field '{}'", key));
  }
  const parallel::Mesh mesh = parallel::parse_mesh(line.at("mesh").get<std::string>());
  Checked checked{.mesh = mesh_name(mesh),
                  .shape = line.at("shape").get<std::string>(),
                  .gpus = line.at("gpus").get<int>(),
                  .measured_ms = line.at("ms").get<double>(),
                  .predicted_ms = 0};
  const std::vector<std::int64_t> shape = parse_shape(checked.shape);
  request.problem = {.batch = shape[0],
                     .num_heads = shape[1],
                     .num_kv_heads = line.value("kv_heads", shape[1]),
                     .seq_q = shape[2],
                     .seq_kv = shape[3],
                     .head_size = shape[4],
                     .dtype = kBFloat16,
                     .causal = line.value("causal", false)};
  request.joint_tokens = line.value("joint_tokens", std::int64_t{0});
  request.link = line.value("link", request.link);
  request.gpus = checked.gpus;
  if (!(checked.measured_ms > 0)) throw ValueError(fmt::format("a time of {} ms", checked.measured_ms));
  const planner::Plan plan = make_plan(request, figures);
  const auto found = std::ranges::find(plan.meshes, mesh, &planner::MeshPlan::mesh);
  if (found == plan.meshes.end())
    throw ValueError(fmt::format("'{}' is no mesh of {} GPUs", checked.mesh, checked.gpus));
  checked.predicted_ms = found->ms;
  return checked;
}

std::vector<Checked> check_file(const std::string& file, const planner::Request& defaults,
                                const planner::Figures& figures) {
  std::ifstream stream(file);
  if (!stream) throw FileError(fmt::format("Cannot read the measured times '{}'.", file));
  std::vector<Checked> all;
  std::string text;
  for (int number = 1; std::getline(stream, text); ++number) {
    if (text.empty()) continue;
    const auto fail = [&](const std::string& what) {
      throw FileError(
          fmt::format("'{}', line {}: {}. Expected {{\"gpus\": 2, \"mesh\": \"ulysses=2\", \"shape\": "
                      "\"B,H,Sq,Skv,D\", \"ms\": 1.5}}.",
                      file, number, what));
    };
    try {
      all.push_back(check_line(Json::parse(text), defaults, figures));
    } catch (const Json::exception& error) {
      fail(error.what());
    } catch (const ValueError& error) {
      fail(error.message());
    }
  }
  return all;
}

}  // namespace

int check_plans(const std::string& file, const planner::Request& defaults, const planner::Figures& figures, bool json) {
  const std::vector<Checked> all = check_file(file, defaults, figures);
  Json lines = Json::array();
  Table table{.columns = {{"GPUs", true},
                          {"mesh"},
                          {"shape"},
                          {"measured ms", true},
                          {"predicted ms", true},
                          {"predicted / measured", true}},
              .rows = {}};
  for (const Checked& entry : all) {
    const double ratio = entry.predicted_ms / entry.measured_ms;
    lines.push_back({{"gpus", entry.gpus},
                     {"mesh", entry.mesh},
                     {"shape", entry.shape},
                     {"measured_ms", entry.measured_ms},
                     {"predicted_ms", entry.predicted_ms},
                     {"ratio", ratio}});
    table.rows.push_back({{std::to_string(entry.gpus)},
                          {entry.mesh},
                          {entry.shape},
                          {fmt::format("{:.4g}", entry.measured_ms)},
                          {fmt::format("{:.4g}", entry.predicted_ms)},
                          {fmt::format("{:.3f}", ratio)}});
  }
  if (json) {
    print_json({{"checks", std::move(lines)}});
  } else {
    print(format_table(table, use_colour()));
  }
  return kDone;
}

}  // namespace ditattn::cli
