#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/log.hpp"
#include "selector/candidate.hpp"
#include "tuner/tuned_table.hpp"

namespace ditattn {

inline constexpr const char* kPlatformDefault = "Platform default";

/// How a class chooses, per problem, among several.
struct DispatchRules {
  std::string subject = kPlatformDefault;  ///< what moves on, in messages
  std::vector<Candidate> in_order;         ///< the first that takes a problem computes it, and the first's causal rule
                                           ///< holds for all; one at least where a choice is to be made
  std::vector<std::string> passed_over = {};  ///< who would be in the order too, were it usable, and why it is not
  bool is_measured = false;                   ///< where a problem was measured, the best of all candidates goes first
  std::optional<double> max_error = std::nullopt;  ///< for that; none: exact
  std::vector<Candidate> measured_only = {};       ///< these only so
  LogLevel level = LogLevel::info;                 ///< of the message that tells of a move, once per layer

  /// `in_order`, then `measured_only`.
  [[nodiscard]] std::size_t size() const { return in_order.size() + measured_only.size(); }
  [[nodiscard]] const Candidate& at(std::size_t index) const {
    return index < in_order.size() ? in_order[index] : measured_only[index - in_order.size()];
  }
  friend bool operator==(const DispatchRules&, const DispatchRules&) = default;
};

/// Who computes a problem.
struct DispatchChoice {
  std::optional<std::size_t> index = std::nullopt;  ///< of `DispatchRules::at`; none: nobody takes it
  bool is_measured = false;
  std::vector<std::string> refusals = {};  ///< what spoke against those before it in the order; all where none is left
};
DispatchChoice choose(const DispatchRules& rules, const Problem& problem, const TunedTable* table);

/// What was measured on the problem's device, as far as the rules ask for it; null for nothing.
std::shared_ptr<const TunedTable> table_for(const DispatchRules& rules, DLDevice device);

/// One class over the candidates, which passes each call to the one of `choose`. The same object for the same rules; a
/// lone candidate's own class where there is nothing to choose.
BackendClass default_backend(DispatchRules rules);

}  // namespace ditattn
