#pragma once

#include <string>

#include "tools/ditattn/comparison.hpp"

namespace ditattn::cli {

/// Why a case's recommended backend is the one, or why none is: sentences for people.
std::string recommendation_text(const CaseResult& result);

}  // namespace ditattn::cli
