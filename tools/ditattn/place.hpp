#pragma once

#include <optional>
#include <string>

namespace ditattn::cli {

/// Where in a model a case was recorded.
struct Place {
  std::string file;   ///< the capture's stem
  std::string layer;  ///< "blocks.0.attn"
  std::string level;  ///< the noise level, "t=0.95", or the step, "step 5"; empty: not known
  double order = 0;   ///< of levels: the step, or else the noise level
};

/// What a case's name tells, "step000005/blocks.0.attn" or "blocks.0 t=0.95", and what its file's metadata does.
Place place_of(const std::string& file, const std::string& name, const std::optional<std::string>& layer,
               std::optional<double> timestep);

}  // namespace ditattn::cli
