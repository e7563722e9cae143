#include "tools/ditattn/table.hpp"

#include <algorithm>
#include <string_view>

#include "tools/ditattn/output.hpp"

namespace ditattn::cli {
namespace {

bool starts_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }  // UTF-8

// Characters as a terminal counts them, near enough: no wide or combining ones occur in our tables.
std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(std::ranges::count_if(text, starts_character));
}

const char* colour_code(Emphasis emphasis) {
  switch (emphasis) {
    case Emphasis::good:
      return "\x1b[32m";
    case Emphasis::bad:
      return "\x1b[31m";
    case Emphasis::faint:
      return "\x1b[2m";
    case Emphasis::none:
      break;
  }
  return "";
}

std::string padded(const Cell& cell, const Column& column, std::size_t width, bool colour) {
  std::string text = printable(cell.text);
  const std::string padding(width - width_of(text), ' ');
  if (colour && cell.emphasis != Emphasis::none) text = colour_code(cell.emphasis) + text + "\x1b[0m";
  return column.is_number ? padding + text : text + padding;
}

void append_line(std::string& result, const std::string& line) {
  result.append(line, 0, line.find_last_not_of(' ') + 1);
  result += '\n';
}

}  // namespace

std::string format_table(const Table& table, bool colour) {
  std::vector<std::size_t> widths;
  for (std::size_t c = 0; c < table.columns.size(); ++c) {
    std::size_t width = 0;
    for (const auto& row : table.rows) width = std::max(width, width_of(printable(row[c].text)));
    widths.push_back(width == 0 ? 0 : std::max(width, width_of(table.columns[c].title)));
  }
  std::string result;
  const auto add_line = [&](const auto& cell_of) {
    std::string line;
    for (std::size_t c = 0; c < widths.size(); ++c) {
      if (widths[c] == 0) continue;
      if (!line.empty()) line += "  ";
      line += padded(cell_of(c), table.columns[c], widths[c], colour);
    }
    append_line(result, line);
  };
  add_line([&](std::size_t c) { return Cell{table.columns[c].title, Emphasis::faint}; });
  for (const auto& row : table.rows) add_line([&](std::size_t c) { return row[c]; });
  return result;
}

std::string shorten(const std::string& text, std::size_t width) {
  if (width_of(text) <= width) return text;
  std::string result;
  std::size_t characters = 0;
  for (const char c : text) {
    if (starts_character(c) && ++characters >= width) break;
    result += c;
  }
  return result + "…";
}

}  // namespace ditattn::cli
