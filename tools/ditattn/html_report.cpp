#include "tools/ditattn/html_report.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "tools/ditattn/html_plots.hpp"
#include "tools/ditattn/html_summary.hpp"
#include "tools/ditattn/html_text.hpp"
#include "tools/ditattn/recommendation.hpp"
#include "tools/ditattn/summary.hpp"

namespace ditattn {

std::string_view report_css();  // report.css

namespace cli {
namespace {

constexpr std::size_t kCasesOpen = 8;

std::string figure(const std::string& content, std::string_view caption) {
  return content.empty() ? "" : "<figure>\n" + content + element("figcaption", "", caption) + "</figure>\n";
}

std::string plots_html(const std::string& bars, std::string_view bars_caption, const std::string& scatter,
                       std::string_view scatter_caption) {
  return "<div class=\"plots\">\n" + figure(bars, bars_caption) + figure(scatter, scatter_caption) + "</div>\n";
}

std::string folded(std::string_view title, bool is_open, const std::string& content) {
  return fmt::format("<details{}>{}\n{}</details>\n", is_open ? " open" : "", element("summary", "", title), content);
}

const BackendResult* recommended_entry(const CaseResult& result) {
  const auto found = std::ranges::find_if(
      result.results, [&](const BackendResult& entry) { return result.recommended == entry.backend; });
  return found == result.results.end() ? nullptr : &*found;
}

// --- Overview -------------------------------------------------------------------------------------------------------

Plot overview_plot(const Comparison& comparison) {
  Plot plot{.title = "All cases: speed relative to the fastest exact back end, and worst error",
            .speed_axis = "speed, 1 is the fastest exact one",
            .points = {},
            .lines = {{.name = "fastest exact", .speed = 1}}};
  const std::vector<std::string> backends = available_backends(comparison);
  const SummaryRow all = summarize_all(comparison, backends);
  for (std::size_t i = 0; i < backends.size(); ++i) {
    const Summary& entry = all.backends[i];
    if (entry.cases == 0 || !entry.relative_speed) continue;
    plot.points.push_back({.backend = backends[i],
                           .speed = *entry.relative_speed,
                           .note = fmt::format("{:.2f}×, error {:.1e}, {} of {} cases", *entry.relative_speed,
                                               entry.worst, entry.cases, entry.cases + entry.missing),
                           .error = entry.worst});
  }
  return plot;
}

Table recommendations(const Comparison& comparison) {
  Table table{.columns = {{"case"}, {"recommended"}, {"median ms", true}, {"TFLOP/s", true}, {"rel L2 error", true}},
              .rows = {}};
  for (const CaseResult& result : comparison.cases) {
    const BackendResult* best = recommended_entry(result);
    if (best == nullptr || !best->timing || !best->accuracy) {
      table.rows.push_back({{result.name}, {"none", Emphasis::faint}, {""}, {""}, {""}});
      continue;
    }
    table.rows.push_back({{result.name},
                          {best->backend, Emphasis::good},
                          {fmt::format("{:.4g}", best->timing->median_ms)},
                          {fmt::format("{:.3g}", best->timing->tflops)},
                          {fmt::format("{:.1e}", best->accuracy->rel_l2)}});
  }
  return table;
}

std::string overview_html(const Comparison& comparison) {
  std::string html = element("h2", "", "Overview");
  if (comparison.cases.size() > 1) {
    const Plot plot = overview_plot(comparison);
    html += plots_html(bar_plot(plot),
                       "Speed over all cases: geometric mean, relative to the fastest exact back end of each.",
                       scatter_plot(plot), "The worst error of any case against that speed: better is right and low.");
  }
  const std::string best = table_html(recommendations(comparison));
  html += comparison.cases.size() <= kCasesOpen ? best : folded("Recommended in each case", false, best);
  if (const Table table = unavailable_table(comparison); !table.rows.empty()) html += table_html(table);
  return html;
}

// --- Cases ----------------------------------------------------------------------------------------------------------

// The ceilings that concern a case: products of its dtype and of 8 bits, and what memory allows.
std::vector<PlotLine> ceiling_lines(const Comparison& comparison, const CaseResult& result) {
  std::vector<PlotLine> lines;
  if (!comparison.ceilings) return lines;
  for (const Ceiling& ceiling : comparison.ceilings->products) {
    const bool concerns = ceiling.name == dtype_name(result.problem.dtype) || ceiling.name == "8 bits";
    if (ceiling.rate && concerns) lines.push_back({.name = ceiling.name + " products", .speed = *ceiling.rate});
  }
  if (const auto least_ms = memory_ms(*comparison.ceilings, result.problem)) {
    lines.push_back({.name = fmt::format("memory, {:.3g} ms", *least_ms),
                     .speed = operations(result.problem) / (*least_ms * 1e-3) / 1e12});
  }
  return lines;
}

Plot case_plot(const Comparison& comparison, const CaseResult& result) {
  Plot plot{.title = "Speed and error of each back end on " + result.name,
            .speed_axis = "TFLOP/s",
            .points = {},
            .lines = ceiling_lines(comparison, result),
            .error_bound = result.error_bound};
  for (const BackendResult& entry : result.results) {
    if (!entry.timing || !entry.accuracy) continue;
    plot.points.push_back(
        {.backend = entry.backend,
         .speed = entry.timing->tflops,
         .note = fmt::format("{:.3g} TFLOP/s, {:.4g} ms", entry.timing->tflops, entry.timing->median_ms),
         .error = entry.accuracy->rel_l2,
         .emphasized = result.recommended == entry.backend});
  }
  return plot;
}

std::string case_html(const Comparison& comparison, const CaseResult& result, bool is_open) {
  const Plot plot = case_plot(comparison, result);
  std::string content = element("p", "faint", describe(result)) + element("p", "", recommendation_text(result)) +
                        plots_html(bar_plot(plot), "Speed, and ceilings of this machine.", scatter_plot(plot),
                                   "Error against speed: better is right and low.") +
                        table_html(results_table(result));
  if (comparison.ranks) content += element("p", "faint", describe(*comparison.ranks)) + table_html(ranks_table(result));
  return folded(result.name, is_open, content);
}

std::string cases_html(const Comparison& comparison) {
  std::string html = element("h2", "", "Cases");
  html += element("p", "faint",
                  "TFLOP/s count 4·B·H·Sq·Skv·D per call, masked or not (half of it when causal). A line is a ceiling: "
                  "the highest rate of products that was measured here, and the speed at which Q, K, V and the output "
                  "would take as long as memory takes to move them once. Small inputs stay in caches, which are faster "
                  "than memory; quantized back ends multiply other numbers than the inputs' dtype.");
  for (const CaseResult& result : comparison.cases) {
    html += case_html(comparison, result, comparison.cases.size() <= kCasesOpen);
  }
  return html;
}

// --- The rest -------------------------------------------------------------------------------------------------------

std::string pictures_html(const ReportContext& context) {
  if (context.pictures.empty()) return {};
  std::string html = element("h2", "", "Pictures") + "<div class=\"plots\">\n";
  for (const Picture& picture : context.pictures) {
    html += figure(fmt::format("<img alt=\"{}\" src=\"{}\">\n", escaped(picture.caption), picture.data_uri),
                   picture.caption);
  }
  return html + "</div>\n";
}

Table ceilings_table(const Ceilings& ceilings) {
  Table table{.columns = {{"ceiling"}, {"rate", true}, {"how it was measured"}}, .rows = {}};
  const auto add = [&](const Ceiling& ceiling, const char* what, const char* unit) {
    table.rows.push_back({{ceiling.name + what},
                          {ceiling.rate ? fmt::format("{:.3g} {}", *ceiling.rate, unit) : "not measured",
                           ceiling.rate ? Emphasis::none : Emphasis::faint},
                          {ceiling.how}});
  };
  for (const Ceiling& ceiling : ceilings.products) add(ceiling, " products", "TFLOP/s");
  add(ceilings.memory, "", "GB/s");
  return table;
}

std::string machine_html(const Comparison& comparison, const ReportContext& context) {
  Table facts{.columns = {{"machine and libraries"}, {""}}, .rows = {}};
  for (const auto& [name, value] : context.facts) facts.rows.push_back({{name}, {value}});
  std::string html = element("h2", "", "Machine") + table_html(facts);
  return comparison.ceilings ? html + table_html(ceilings_table(*comparison.ceilings)) : html;
}

}  // namespace

std::string html_report(const Comparison& comparison, const ReportContext& context) {
  std::string html =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<link rel=\"icon\" href=\"data:,\">\n<title>ditattn compare</title>\n<style>\n";
  html += report_css();
  html += "</style>\n</head>\n<body>\n<h1>ditattn compare</h1>\n";
  html += element("p", "", fmt::format("{}, {}", context.made_at, describe(comparison.machine)));
  html += "<p>" + element("code", "", context.command) + "</p>\n";
  html += overview_html(comparison) + pictures_html(context);
  if (const auto summary = summarize(comparison)) html += summary_html(*summary);
  html += cases_html(comparison) + machine_html(comparison, context);
  html += element("p", "faint",
                  "The JSON below, element ditattn-comparison of this page, is the document of compare --json.");
  return html + json_html("ditattn-comparison", to_json(comparison)) + "</body>\n</html>\n";
}

}  // namespace cli
}  // namespace ditattn
