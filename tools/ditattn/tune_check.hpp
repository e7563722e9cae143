#pragma once

#include <optional>
#include <string>

#include "ditattn/tuner.hpp"
#include "tools/ditattn/inputs.hpp"

namespace ditattn::cli {

/// How the default did beside the backends it chooses among.
struct TuneCheck {
  double auto_ms = 0;  ///< of the default, dispatch included; a median
  double best_ms = 0;  ///< of the fastest single one within the error; a median
  double ratio = 0;    ///< of the default's time to that one's, a median of what each round gave
  std::string best;
};

/// Times the default, and each backend that was measured to be within `max_error`, in the same interleaved rounds. None
/// where no backend was.
std::optional<TuneCheck> check_choice(const Inputs& inputs, const ImplConfig& config, const TunedProblem& measured,
                                      std::optional<double> max_error, double budget_ms);

}  // namespace ditattn::cli
