#pragma once

#include <string>
#include <vector>

namespace ditattn::cli {

enum class Emphasis { none, good, bad, faint };

struct Cell {
  std::string text;
  Emphasis emphasis = Emphasis::none;
};

struct Column {
  std::string title;
  bool is_number = false;  ///< aligned to the right
};

/// Columns and rows of text, for people: printed on a terminal or set in HTML.
struct Table {
  std::vector<Column> columns;
  std::vector<std::vector<Cell>> rows;
};

/// Aligned columns, two spaces between them, one line a row. Columns without any text are left out.
std::string format_table(const Table& table, bool colour);

/// `text`, cut to `width` characters with an ellipsis.
std::string shorten(const std::string& text, std::size_t width);

}  // namespace ditattn::cli
