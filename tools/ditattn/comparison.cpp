#include "tools/ditattn/comparison.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/summary.hpp"

namespace ditattn::cli {
namespace {

constexpr int kCasesShown = 8;

Json shape_of(const Problem& p) { return Json::array({p.batch, p.num_heads, p.seq_q, p.seq_kv, p.head_size}); }

Json text_or_null(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

Json to_json(const BackendResult& result) {
  const auto time = [&](double Timing::*field) { return result.timing ? Json((*result.timing).*field) : Json(); };
  const auto error = [&](double Accuracy::*field) {
    return result.accuracy ? Json((*result.accuracy).*field) : Json();
  };
  return {{"backend", result.backend},
          {"engine", text_or_null(result.engine)},
          {"status", status_name(result.status)},
          {"reason", text_or_null(result.reason)},
          {"median_ms", time(&Timing::median_ms)},
          {"min_ms", time(&Timing::min_ms)},
          {"tflops", time(&Timing::tflops)},
          {"rel_l2", error(&Accuracy::rel_l2)},
          {"max_abs", error(&Accuracy::max_abs)},
          {"cosine", error(&Accuracy::cosine)}};
}

// One rank's time relative to that of all.
std::optional<double> speed_of(const BackendResult& one, const BackendResult& all) {
  if (!one.timing || !all.timing) return std::nullopt;
  return one.timing->median_ms / all.timing->median_ms;
}

Json to_json(const CaseResult& result) {
  Json results = Json::array();
  for (const BackendResult& entry : result.results) results.push_back(to_json(entry));
  Json over_ranks = Json::array();
  for (std::size_t i = 0; i < result.over_ranks.size(); ++i) {
    const auto speed = speed_of(result.results[i], result.over_ranks[i]);
    over_ranks.push_back(to_json(result.over_ranks[i]));
    over_ranks.back()["speed"] = speed ? Json(*speed) : Json(nullptr);
  }
  const Problem& problem = result.problem;
  Json document = {{"case", result.name},
                   {"shape", shape_of(problem)},
                   {"kv_heads", problem.num_kv_heads},
                   {"dtype", dtype_name(problem.dtype)},
                   {"device", device_name(problem.device)},
                   {"mask", mask_kind_name(problem.mask)},
                   {"causal", problem.causal},
                   {"sample_rows", result.sample_rows ? Json(*result.sample_rows) : Json(nullptr)},
                   {"error_bound", result.error_bound},
                   {"results", results},
                   {"recommended", result.recommended ? Json(*result.recommended) : Json(nullptr)}};
  if (!over_ranks.empty()) document["parallel"] = std::move(over_ranks);
  return document;
}

Json to_json(const RanksInfo& ranks) {
  const parallel::Mesh& mesh = ranks.mesh;
  return {{"ranks", mesh.ulysses * mesh.second()},
          {"kind", ranks.kind},
          {"ulysses", mesh.ulysses},
          {"ring", mesh.ring},
          {"allgather", mesh.allgather}};
}

Emphasis emphasis_of(const CaseResult& result, const BackendResult& entry) {
  if (result.recommended == entry.backend) return Emphasis::good;
  return entry.status == Status::failed ? Emphasis::bad : Emphasis::none;
}

Cell time_cell(const BackendResult& entry, double Timing::*field, const char* format) {
  return {entry.timing ? fmt::format(fmt::runtime(format), (*entry.timing).*field) : ""};
}

Cell error_cell(const BackendResult& entry, double Accuracy::*field, const char* format) {
  return {entry.accuracy ? fmt::format(fmt::runtime(format), (*entry.accuracy).*field) : ""};
}

std::vector<Cell> row(const CaseResult& result, const BackendResult& entry) {
  const bool recommended = result.recommended == entry.backend;
  return {{entry.backend, emphasis_of(result, entry)},
          {status_name(entry.status)},
          time_cell(entry, &Timing::median_ms, "{:.4g}"),
          time_cell(entry, &Timing::min_ms, "{:.4g}"),
          time_cell(entry, &Timing::tflops, "{:.3g}"),
          error_cell(entry, &Accuracy::rel_l2, "{:.2e}"),
          error_cell(entry, &Accuracy::max_abs, "{:.2e}"),
          error_cell(entry, &Accuracy::cosine, "{:.7f}"),
          {entry.engine},
          {recommended ? "recommended" : entry.reason, emphasis_of(result, entry)}};
}

}  // namespace

const char* status_name(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::unavailable:
      return "unavailable";
    case Status::unsupported:
      return "unsupported";
    case Status::failed:
      break;
  }
  return "failed";
}

bool is_within(const BackendResult& result, double bound) {
  return result.status == Status::ok && result.accuracy && result.accuracy->rel_l2 <= bound;
}

Json to_json(const Comparison& comparison) {
  Json cases = Json::array();
  for (const CaseResult& result : comparison.cases) cases.push_back(to_json(result));
  Json document = {{"machine", to_json(comparison.machine)}, {"cases", cases}};
  if (comparison.ranks) document["parallel"] = to_json(*comparison.ranks);
  if (comparison.ceilings) document["machine"]["ceilings"] = to_json(*comparison.ceilings);
  if (const auto summary = summarize(comparison)) document["summary"] = to_json(*summary);
  return document;
}

std::string describe(const CaseResult& result) {
  return fmt::format("{}: {}; errors over {} rows, bound {:.1e}", result.name, describe(result.problem),
                     result.sample_rows ? fmt::format("{} sampled", *result.sample_rows) : "all", result.error_bound);
}

Table results_table(const CaseResult& result) {
  Table table{.columns = {{"backend"},
                          {"status"},
                          {"median ms", true},
                          {"min ms", true},
                          {"TFLOP/s", true},
                          {"rel L2 error", true},
                          {"max abs error", true},
                          {"cosine", true},
                          {"engine"},
                          {"note"}},
              .rows = {}};
  for (const BackendResult& entry : result.results) {
    if (entry.status != Status::unavailable) table.rows.push_back(row(result, entry));
  }
  return table;
}

Table ranks_table(const CaseResult& result) {
  Table table{.columns = {{"backend"},
                          {"status"},
                          {"one rank ms", true},
                          {"median ms", true},
                          {"min ms", true},
                          {"speed", true},
                          {"TFLOP/s", true},
                          {"rel L2 error", true},
                          {"max abs error", true},
                          {"note"}},
              .rows = {}};
  for (std::size_t i = 0; i < result.over_ranks.size(); ++i) {
    const BackendResult& one = result.results[i];
    const BackendResult& all = result.over_ranks[i];
    if (all.status == Status::unavailable) continue;
    const auto speed = speed_of(one, all);
    const Emphasis emphasis = all.status == Status::failed ? Emphasis::bad : Emphasis::none;
    table.rows.push_back({{all.backend, emphasis},
                          {status_name(all.status)},
                          time_cell(one, &Timing::median_ms, "{:.4g}"),
                          time_cell(all, &Timing::median_ms, "{:.4g}"),
                          time_cell(all, &Timing::min_ms, "{:.4g}"),
                          {speed ? fmt::format("{:.2f}×", *speed) : ""},
                          time_cell(all, &Timing::tflops, "{:.3g}"),
                          error_cell(all, &Accuracy::rel_l2, "{:.2e}"),
                          error_cell(all, &Accuracy::max_abs, "{:.2e}"),
                          {all.reason, emphasis}});
  }
  return table;
}

std::string describe(const RanksInfo& ranks) {
  const int count = ranks.mesh.ulysses * ranks.mesh.second();
  const std::string degrees = count == 1 ? "1 rank" : fmt::format("{} ranks ({})", count, mesh_name(ranks.mesh));
  return fmt::format("over {}, {}; times are the slowest rank's, speed is one rank's time over that", degrees,
                     ranks.kind);
}

Table unavailable_table(const Comparison& comparison) {
  Table table{.columns = {{"not available here"}, {"reason"}}, .rows = {}};
  if (comparison.cases.empty()) return table;
  for (const BackendResult& entry : comparison.cases.front().results) {
    if (entry.status != Status::unavailable) continue;
    table.rows.push_back({{entry.backend, Emphasis::faint}, {short_reason(entry.reason), Emphasis::faint}});
  }
  return table;
}

std::string format_comparison(const Comparison& comparison, bool all_cases, bool colour) {
  std::string text = printable(describe(comparison.machine)) + "\n";
  if (const Table table = unavailable_table(comparison); !table.rows.empty()) {
    text += "\n" + format_table(table, colour);
  }
  const auto recorded =
      std::ranges::count_if(comparison.cases, [](const CaseResult& c) { return c.place.has_value(); });
  all_cases |= recorded <= kCasesShown;
  for (const CaseResult& result : comparison.cases) {
    if (result.place && !all_cases) continue;
    text += "\n" + printable(describe(result)) + "\n" + format_table(results_table(result), colour);
    if (comparison.ranks) text += describe(*comparison.ranks) + "\n" + format_table(ranks_table(result), colour);
  }
  if (const auto summary = summarize(comparison)) {
    if (!all_cases) text += fmt::format("\n{} recorded cases; --all-cases, --json and --report show each\n", recorded);
    text += format_summary(*summary, colour);
  }
  return text;
}

}  // namespace ditattn::cli
