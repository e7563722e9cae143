#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tools/ditattn/comparison.hpp"

namespace ditattn::cli {

/// A picture to show in a report.
struct Picture {
  std::string caption;
  std::string data_uri;  ///< "data:image/png;base64,…"
};

/// Reads "CAPTION=FILE": a PNG, JPEG, GIF, WebP or SVG file, told by its content, of 8 MiB at most. UsageError for
/// other forms, FileError for a file that is missing or none of these.
Picture load_picture(const std::string& caption_and_file);

/// What a report tells beside the comparison.
struct ReportContext {
  std::string command;                                     ///< as typed, quoted for a shell
  std::string made_at;                                     ///< "2026-11-24 12:00 UTC"
  std::vector<std::pair<std::string, std::string>> facts;  ///< of the machine and its libraries: what, value
  std::vector<Picture> pictures;
};

/// The context of a comparison made now. `words` is the command line, the program first. Optional libraries are looked
/// for as `doctor` does.
ReportContext report_context(const Comparison& comparison, const std::vector<std::string>& words,
                             std::vector<Picture> pictures);

}  // namespace ditattn::cli
