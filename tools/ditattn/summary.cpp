#include "tools/ditattn/summary.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <set>

namespace ditattn::cli {
namespace {

constexpr std::size_t kNamesShown = 8;

// NaN is larger than any number.
bool is_larger(double a, double b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

const BackendResult* find(const CaseResult& result, const std::string& backend) {
  const auto found = std::ranges::find(result.results, backend, &BackendResult::backend);
  return found == result.results.end() ? nullptr : &*found;
}

using Cases = std::vector<const CaseResult*>;

Summary summarize_backend(const Cases& cases, const std::string& backend) {
  Summary summary;
  double logarithms = 0;
  std::int64_t timed = 0;
  for (const CaseResult* result : cases) {
    const BackendResult* entry = find(*result, backend);
    if (entry == nullptr || !entry->accuracy) {
      ++summary.missing;
      continue;
    }
    const double error = entry->accuracy->rel_l2;
    if (summary.cases++ == 0 || is_larger(error, summary.worst)) {
      summary.worst = error;
      summary.worst_at = result->place ? result->place->level : result->name;
    }
    if (const auto speed = relative_speed(*result, *entry)) {
      logarithms += std::log(*speed);
      ++timed;
    }
  }
  if (timed > 0) summary.relative_speed = std::exp(logarithms / static_cast<double>(timed));
  return summary;
}

SummaryRow summarize_row(std::string name, const Cases& cases, const std::vector<std::string>& backends) {
  SummaryRow row{.name = std::move(name), .backends = {}};
  for (const std::string& backend : backends) row.backends.push_back(summarize_backend(cases, backend));
  return row;
}

// The rows' names, in the order of the cases given.
std::vector<SummaryRow> rows_by(const Cases& cases, const std::vector<std::string>& backends,
                                const std::function<std::string(const CaseResult&)>& name_of) {
  std::vector<std::pair<std::string, Cases>> groups;
  for (const CaseResult* result : cases) {
    const std::string name = name_of(*result);
    const auto found = std::ranges::find(groups, name, &std::pair<std::string, Cases>::first);
    if (found == groups.end()) {
      groups.push_back({name, {result}});
    } else {
      found->second.push_back(result);
    }
  }
  std::vector<SummaryRow> rows;
  rows.reserve(groups.size());
  for (const auto& [name, group] : groups) rows.push_back(summarize_row(name, group, backends));
  return rows;
}

// Where a backend's error is over what rounding allows, or no number, in any of the cases.
bool is_inexact(const Cases& cases, const std::string& backend) {
  return std::ranges::any_of(cases, [&](const CaseResult* result) {
    const BackendResult* entry = find(*result, backend);
    return entry != nullptr && entry->accuracy && is_larger(entry->accuracy->rel_l2, result->exact_bound);
  });
}

std::optional<double> mean_speed(const CaptureSummary& summary, std::size_t backend,
                                 const std::vector<std::size_t>& layers) {
  double logarithms = 0;
  int timed = 0;
  for (const std::size_t layer : layers) {
    if (const auto speed = summary.layers[layer].backends[backend].relative_speed) {
      logarithms += std::log(*speed);
      ++timed;
    }
  }
  return timed > 0 ? std::optional(std::exp(logarithms / timed)) : std::nullopt;
}

LayerVerdict verdict_on(const CaptureSummary& summary, std::size_t backend) {
  LayerVerdict verdict{.backend = summary.backends[backend]};
  const auto of = [&](std::size_t layer) -> const Summary& { return summary.layers[layer].backends[backend]; };
  for (std::size_t layer = 0; layer < summary.layers.size(); ++layer) {
    (is_tolerated(of(layer), summary.tolerance) ? verdict.within : verdict.beyond).push_back(layer);
  }
  for (std::vector<std::size_t>* layers : {&verdict.within, &verdict.beyond}) {
    std::ranges::stable_sort(*layers, [&](std::size_t a, std::size_t b) {
      if (of(a).cases == 0 || of(b).cases == 0) return of(a).cases > of(b).cases;
      return is_larger(of(a).worst, of(b).worst);
    });
  }
  verdict.relative_speed = mean_speed(summary, backend, verdict.within);
  return verdict;
}

Json number_or_null(const std::optional<double>& number) { return number ? Json(*number) : Json(nullptr); }

Json to_json(const SummaryRow& row, const CaptureSummary& summary, const char* key) {
  Json backends = Json::array();
  for (std::size_t i = 0; i < row.backends.size(); ++i) {
    const Summary& entry = row.backends[i];
    backends.push_back({{"backend", summary.backends[i]},
                        {"cases", entry.cases},
                        {"missing", entry.missing},
                        {"worst_rel_l2", entry.cases > 0 ? Json(entry.worst) : Json(nullptr)},
                        {"within", is_tolerated(entry, summary.tolerance)},
                        {"relative_speed", number_or_null(entry.relative_speed)}});
  }
  return {{key, row.name}, {"results", std::move(backends)}};
}

Cell cell_of(const Summary& entry, double tolerance) {
  if (entry.cases == 0) return {"refused", Emphasis::faint};
  std::string text = fmt::format("{:.1e}", entry.worst);
  if (entry.relative_speed) text += fmt::format(" {:.2f}×", *entry.relative_speed);
  if (entry.missing > 0) text += fmt::format(" ({} of {})", entry.cases, entry.cases + entry.missing);
  const bool over = is_larger(entry.worst, tolerance);
  return {text + (over ? " over" : ""), over ? Emphasis::bad : Emphasis::none};
}

Table table_of(const std::vector<SummaryRow>& rows, const CaptureSummary& summary, const char* title) {
  Table table{.columns = {{title}}, .rows = {}};
  for (const std::string& backend : summary.backends) table.columns.push_back({backend});
  for (const SummaryRow& row : rows) {
    std::vector<Cell>& cells = table.rows.emplace_back();
    cells.push_back({row.name});
    for (const Summary& entry : row.backends) cells.push_back(cell_of(entry, summary.tolerance));
  }
  return table;
}

std::string list_of(const CaptureSummary& summary, const std::string& backend, const std::vector<std::size_t>& layers) {
  const auto index = static_cast<std::size_t>(std::ranges::find(summary.backends, backend) - summary.backends.begin());
  std::vector<std::string> names;
  for (const std::size_t layer : layers) {
    if (names.size() == kNamesShown) break;
    const Summary& entry = summary.layers[layer].backends[index];
    std::string what = "refused";
    if (entry.cases > 0) {
      what = fmt::format("{:.1e}", entry.worst);
      if (!entry.worst_at.empty()) what += " at " + entry.worst_at;
    }
    names.push_back(fmt::format("{} ({})", summary.layers[layer].name, what));
  }
  if (const std::size_t more = layers.size() - names.size(); more > 0) names.push_back(fmt::format("{} more", more));
  return fmt::format("{}", fmt::join(names, ", "));
}

}  // namespace

bool is_tolerated(const Summary& summary, double tolerance) {
  return summary.cases > 0 && summary.missing == 0 && !is_larger(summary.worst, tolerance);
}

std::vector<std::string> available_backends(const Comparison& comparison) {
  std::vector<std::string> names;
  if (comparison.cases.empty()) return names;
  for (const BackendResult& entry : comparison.cases.front().results) {
    if (entry.status != Status::unavailable) names.push_back(entry.backend);
  }
  return names;
}

std::optional<double> relative_speed(const CaseResult& result, const BackendResult& entry) {
  double fastest = std::numeric_limits<double>::infinity();
  for (const BackendResult& other : result.results) {
    if (other.timing && is_within(other, result.exact_bound)) fastest = std::min(fastest, other.timing->median_ms);
  }
  if (!entry.timing || std::isinf(fastest)) return std::nullopt;
  return fastest / entry.timing->median_ms;
}

std::optional<CaptureSummary> summarize(const Comparison& comparison) {
  Cases cases;
  std::set<std::string> files;
  for (const CaseResult& result : comparison.cases) {
    if (!result.place) continue;
    cases.push_back(&result);
    files.insert(result.place->file);
  }
  if (cases.size() < 2) return std::nullopt;
  const auto layer_of = [&](const CaseResult& result) {
    return files.size() > 1 ? result.place->file + "/" + result.place->layer : result.place->layer;
  };
  const auto level_of = [](const CaseResult& result) { return result.place->level; };
  CaptureSummary summary{.tolerance = comparison.max_error.value_or(kDefaultTolerance),
                         .is_tolerance_given = comparison.max_error.has_value(),
                         .backends = available_backends(comparison)};
  summary.layers = rows_by(cases, summary.backends, layer_of);
  for (std::size_t i = 0; i < summary.backends.size(); ++i) {
    if (is_inexact(cases, summary.backends[i])) summary.verdicts.push_back(verdict_on(summary, i));
  }
  std::erase_if(cases, [](const CaseResult* result) { return result->place->level.empty(); });
  std::ranges::stable_sort(cases, {}, [](const CaseResult* result) { return result->place->order; });
  summary.levels = rows_by(cases, summary.backends, level_of);
  for (const SummaryRow& layer : summary.layers) {
    std::vector<SummaryRow>& cells = summary.cells.emplace_back();
    for (const SummaryRow& level : summary.levels) {
      Cases both;
      std::ranges::copy_if(cases, std::back_inserter(both), [&](const CaseResult* result) {
        return layer_of(*result) == layer.name && level_of(*result) == level.name;
      });
      cells.push_back(summarize_row(level.name, both, summary.backends));
    }
  }
  return summary;
}

SummaryRow summarize_all(const Comparison& comparison, const std::vector<std::string>& backends) {
  Cases cases;
  for (const CaseResult& result : comparison.cases) cases.push_back(&result);
  return summarize_row("all", cases, backends);
}

Json to_json(const CaptureSummary& summary) {
  Json layers = Json::array();
  for (const SummaryRow& row : summary.layers) layers.push_back(to_json(row, summary, "layer"));
  Json levels = Json::array();
  for (const SummaryRow& row : summary.levels) levels.push_back(to_json(row, summary, "level"));
  Json verdicts = Json::array();
  for (const LayerVerdict& verdict : summary.verdicts) {
    const auto names = [&](const std::vector<std::size_t>& indices) {
      Json result = Json::array();
      for (const std::size_t layer : indices) result.push_back(summary.layers[layer].name);
      return result;
    };
    verdicts.push_back({{"backend", verdict.backend},
                        {"within", names(verdict.within)},
                        {"beyond", names(verdict.beyond)},
                        {"relative_speed", number_or_null(verdict.relative_speed)}});
  }
  return {{"tolerance", summary.tolerance},
          {"tolerance_given", summary.is_tolerance_given},
          {"layers", std::move(layers)},
          {"levels", std::move(levels)},
          {"verdicts", std::move(verdicts)}};
}

std::vector<std::string> verdict_lines(const CaptureSummary& summary) {
  std::vector<std::string> lines;
  for (const LayerVerdict& verdict : summary.verdicts) {
    std::string line = fmt::format("{} stays within {:.1e} in {} of {} layers", verdict.backend, summary.tolerance,
                                   verdict.within.size(), summary.layers.size());
    if (verdict.relative_speed) {
      line += fmt::format(", {:.2f} times as fast there as the fastest exact one", *verdict.relative_speed);
    }
    lines.push_back(line);
    if (!verdict.beyond.empty()) lines.push_back("  beyond: " + list_of(summary, verdict.backend, verdict.beyond));
    if (!verdict.within.empty()) lines.push_back("  within: " + list_of(summary, verdict.backend, verdict.within));
  }
  if (lines.empty()) lines.emplace_back("All back ends that ran are exact here, but for rounding.");
  return lines;
}

Table layer_table(const CaptureSummary& summary) { return table_of(summary.layers, summary, "layer"); }

Table level_table(const CaptureSummary& summary) { return table_of(summary.levels, summary, "level"); }

std::string format_summary(const CaptureSummary& summary, bool colour) {
  std::string text;
  text +=
      "\nLayers and levels: the worst rel_l2, and the speed, where 1× is the fastest exact back end of each case;\n";
  text += fmt::format("\"over\" is over the tolerance of {:.1e} ({})\n", summary.tolerance,
                      summary.is_tolerance_given ? "--max-error" : "the default, --max-error sets it");
  if (summary.layers.size() > 1) text += "\n" + format_table(layer_table(summary), colour);
  if (summary.levels.size() > 1) text += "\n" + format_table(level_table(summary), colour);
  text += '\n';
  for (const std::string& line : verdict_lines(summary)) text += printable(line) + "\n";
  return text;
}

}  // namespace ditattn::cli
