#pragma once

#include <string>

#include "tools/ditattn/comparison.hpp"

namespace ditattn::cli {

/// The comparison as one self-contained page: no scripts, nothing loaded from elsewhere.
std::string html_report(const Comparison& comparison);

}  // namespace ditattn::cli
