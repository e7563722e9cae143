#include "tools/ditattn/html_text.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace ditattn::cli {
namespace {

// report.css has a colour for each, html_plots.cpp a marker.
constexpr std::array<std::string_view, kBackendSlots - 1> kKnown = {
    "FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN", "FLASHINFER_ATTN", "CUSTOM"};

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
  return element(tag, fmt::format("{}{}", column.is_number ? "number " : "", class_of(cell.emphasis)), cell.text);
}

}  // namespace

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

std::string element(const char* tag, std::string_view css_class, std::string_view text) {
  if (css_class.empty()) return fmt::format("<{0}>{1}</{0}>", tag, escaped(text));
  return fmt::format("<{0} class=\"{1}\">{2}</{0}>", tag, css_class, escaped(text));
}

std::string table_html(const Table& table) {
  std::string html = "<div class=\"scroll\"><table>\n<tr>";
  for (const Column& column : table.columns) html += cell_html("th", column, {column.title});
  html += "</tr>\n";
  for (const auto& row : table.rows) {
    html += "<tr>";
    for (std::size_t c = 0; c < row.size(); ++c) html += cell_html("td", table.columns[c], row[c]);
    html += "</tr>\n";
  }
  return html + "</table></div>\n";
}

std::string json_html(const char* id, const Json& document) {
  std::string text;
  for (const char c : json_text(document)) {
    if (c == '<') {
      text += "\\u003c";  // in JSON it stands in strings alone
    } else {
      text += c;
    }
  }
  return fmt::format("<script type=\"application/json\" id=\"{}\">\n{}</script>\n", id, text);
}

std::string backend_class(std::string_view backend) { return fmt::format("b{}", backend_slot(backend)); }

int backend_slot(std::string_view backend) {
  return static_cast<int>(std::ranges::find(kKnown, backend) - kKnown.begin());
}

}  // namespace ditattn::cli
