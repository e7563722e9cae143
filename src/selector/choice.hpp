#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ditattn/selector.hpp"
#include "selector/default_backend.hpp"

namespace ditattn {

/// What was asked for.
struct Request {
  std::string role;
  std::string category;
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

/// Whether a choice is made among several: all but those that name a backend which nothing replaces.
bool may_be_replaced(const AttentionSpec& spec);

/// The rules over those that are available and take the head size, none perhaps. For specs that `may_be_replaced`.
DispatchRules rules_of(const Request& request, const AttentionSpec& spec);

}  // namespace ditattn
