#pragma once

#include <string>

#include "tools/ditattn/summary.hpp"

namespace ditattn::cli {

/// Captures by layer and level: the verdicts, a table of errors per back end whose cells are coloured by decade, and
/// the tables of the terminal.
std::string summary_html(const CaptureSummary& summary);

}  // namespace ditattn::cli
