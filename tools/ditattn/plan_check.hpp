#pragma once

#include <string>

#include "ditattn/planner.hpp"

namespace ditattn::cli {

/// Prints predicted beside measured times, from a file of JSON lines such as
/// {"gpus": 2, "mesh": "ulysses=2", "shape": "1,40,75600,75600,128", "ms": 83.1}; optional: kv_heads, causal,
/// joint_tokens, link. What a line leaves open is `defaults`'. FileError names the line that is none.
int check_plans(const std::string& file, const planner::Request& defaults, const planner::Figures& figures, bool json);

}  // namespace ditattn::cli
