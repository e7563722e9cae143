#include "tools/ditattn/html_summary.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "tools/ditattn/html_text.hpp"

namespace ditattn::cli {
namespace {

// The class of a cell's colour: h0 below 1e-7, one more for each decade, h7 from 0.1 on and for NaN.
std::string heat_class(double error) {
  if (!(error >= 0)) return "h7";
  const double decade = error > 0 ? std::floor(std::log10(error)) + 8 : 0;
  return fmt::format("h{}", static_cast<int>(std::clamp(decade, 0.0, 7.0)));
}

std::string heat_cell(const Summary& entry, double tolerance) {
  if (entry.cases == 0) return element("td", "faint", entry.missing > 0 ? "refused" : "");
  const bool over = !is_tolerated(entry, tolerance);
  return element("td", heat_class(entry.worst) + (over ? " over" : ""),
                 fmt::format("{}{:.1e}", over ? "▲ " : "", entry.worst));
}

std::string heat_table(const CaptureSummary& summary, std::size_t backend) {
  std::string html = element("h3", "", summary.backends[backend]);
  html += "<div class=\"scroll\"><table class=\"heat\">\n<tr>" + element("th", "", "layer");
  for (const SummaryRow& level : summary.levels) html += element("th", "number", level.name);
  html += "</tr>\n";
  for (std::size_t layer = 0; layer < summary.layers.size(); ++layer) {
    html += "<tr>" + element("th", "", summary.layers[layer].name);
    for (const SummaryRow& cell : summary.cells[layer]) {
      html += heat_cell(cell.backends[backend], summary.tolerance);
    }
    html += "</tr>\n";
  }
  return html + "</table></div>\n";
}

}  // namespace

std::string summary_html(const CaptureSummary& summary) {
  std::string html = element("h2", "", "Layers and levels");
  html += element(
      "p", "",
      fmt::format("Which layers tolerate arithmetic that is not exact: rel_l2 within {:.1e} ({}).", summary.tolerance,
                  summary.is_tolerance_given ? "as --max-error says" : "a default; --max-error sets it"));
  for (const std::string& line : verdict_lines(summary))
    html += element("p", line.starts_with(' ') ? "indent" : "", line);
  if (!summary.levels.empty()) {
    html += element(
        "p", "faint",
        "The largest rel_l2 of each layer at each level, darker or brighter by decade; ▲ is over the tolerance.");
    html += "<div class=\"heats\">\n";
    for (std::size_t i = 0; i < summary.backends.size(); ++i) html += "<div>" + heat_table(summary, i) + "</div>\n";
    html += "</div>\n";
  }
  html +=
      element("p", "faint",
              "The worst rel_l2, and the speed, where 1× is the fastest exact back end of each case (geometric mean):");
  if (summary.layers.size() > 1) html += table_html(layer_table(summary));
  if (summary.levels.size() > 1) html += table_html(level_table(summary));
  return html;
}

}  // namespace ditattn::cli
