#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ditattn/observer.hpp"

namespace ditattn {

/// The way around back ends that gave wrong numbers, for one layer or all layers of a role: of the platform's
/// candidates, or the one that was asked for, the first that did not fail and takes the problem. Thread-safe.
class Detour {
 public:
  /// `safer`: a member's name; empty: the platform's candidates.
  explicit Detour(std::string safer) : safer_(std::move(safer)) {}

  /// Opens the way, if it is not yet: `backend` (its `get_name`) is not to be used any more.
  void avoid(const std::string& backend);
  /// Who should make the event's call; null where nobody is to be avoided, or nobody is left. With `reasons`, what
  /// speaks against the others is appended.
  BackendClass choose(const ForwardEvent& event, std::vector<std::string>* reasons = nullptr);

 private:
  [[nodiscard]] std::vector<BackendClass> candidates(DLDevice device) const;

  std::string safer_;
  std::mutex mutex_;
  std::vector<std::string> avoided_;
};

}  // namespace ditattn
