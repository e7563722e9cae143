#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ditattn/selector.hpp"
#include "selector/default_backend.hpp"

namespace ditattn {

/// What was asked for.
struct Request {
  const std::string& role;
  const std::string& category;
  std::int64_t head_size;
  std::string device;
};

/// The specification that goes first, with its source; none if nothing is set.
struct Choice {
  std::optional<AttentionSpec> spec;
  std::string source;
};
Choice choose(const Request& request, const AttentionConfig& config);

/// Members in the order in which the choice tries them, whether they can be had or not.
std::vector<DiffusionAttentionBackendEnum> order_of(const Request& request, const AttentionSpec& spec);

/// The rules over those that are available and take the head size; who is passed over is logged once. For specs that
/// may be replaced, or are automatic. ValueError, with one reason per member, where none is left.
DispatchRules rules_of(const Request& request, const AttentionSpec& spec);

}  // namespace ditattn
