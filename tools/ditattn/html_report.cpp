#include "tools/ditattn/html_report.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace ditattn::cli {
namespace {

constexpr const char* kHead = R"(<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ditattn compare</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
h2 { font-size: 1.05em; margin: 2em 0 .4em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: #176b2c; font-weight: 600; } .bad { color: #a11; } .faint { color: #666; }
svg { margin-top: .6em; }
</style>
</head>
<body>
<h1>ditattn compare</h1>
)";

constexpr int kBarHeight = 18;
constexpr int kBarPitch = 24;
constexpr int kLabelWidth = 150;
constexpr double kBarWidth = 420;

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : printable(text)) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

const char* class_of(Emphasis emphasis) {
  switch (emphasis) {
    case Emphasis::good:
      return "good";
    case Emphasis::bad:
      return "bad";
    case Emphasis::faint:
      return "faint";
    case Emphasis::none:
      break;
  }
  return "";
}

std::string cell_html(const char* tag, const Column& column, const Cell& cell) {
  return fmt::format("<{0} class=\"{1} {2}\">{3}</{0}>", tag, column.is_number ? "number" : "", class_of(cell.emphasis),
                     escaped(cell.text));
}

std::string table_html(const Table& table) {
  std::string html = "<table>\n<tr>";
  for (const Column& column : table.columns) html += cell_html("th", column, {column.title});
  html += "</tr>\n";
  for (const auto& row : table.rows) {
    html += "<tr>";
    for (std::size_t c = 0; c < row.size(); ++c) html += cell_html("td", table.columns[c], row[c]);
    html += "</tr>\n";
  }
  return html + "</table>\n";
}

// Bars as long as the median times.
std::string bars_svg(const CaseResult& result) {
  double longest = 0;
  for (const BackendResult& entry : result.results) {
    if (entry.timing) longest = std::max(longest, entry.timing->median_ms);
  }
  std::string bars;
  int y = 0;
  for (const BackendResult& entry : result.results) {
    if (!entry.timing) continue;
    const double width = longest > 0 ? kBarWidth * entry.timing->median_ms / longest : 0;
    bars += fmt::format(
        "<text x=\"0\" y=\"{0}\">{1}</text><rect x=\"{2}\" y=\"{3}\" width=\"{4:.1f}\" height=\"{5}\" fill=\"{6}\"/>"
        "<text x=\"{7:.1f}\" y=\"{0}\">{8:.4g} ms</text>\n",
        y + 14, escaped(entry.backend), kLabelWidth, y, std::max(width, 1.0), kBarHeight,
        result.recommended == entry.backend ? "#2c8a46" : "#8aa4c0", kLabelWidth + width + 6, entry.timing->median_ms);
    y += kBarPitch;
  }
  if (bars.empty()) return {};
  return fmt::format(
      "<svg width=\"{}\" height=\"{}\" role=\"img\" aria-label=\"median times\" font-size=\"13\">\n{}</svg>\n",
      kLabelWidth + kBarWidth + 110, y, bars);
}

}  // namespace

std::string html_report(const Comparison& comparison) {
  std::string html = kHead;
  html += fmt::format("<p>{}</p>\n", escaped(describe(comparison.machine)));
  if (const Table table = unavailable_table(comparison); !table.rows.empty()) html += table_html(table);
  for (const CaseResult& result : comparison.cases) {
    html += fmt::format("<h2>{}</h2>\n", escaped(describe(result)));
    html += table_html(results_table(result)) + bars_svg(result);
  }
  return html + "</body>\n</html>\n";
}

}  // namespace ditattn::cli
