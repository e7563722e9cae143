#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "sampler.hpp"

namespace digits {

/// Records query, key and value of every block while the first image is sampled, at a few noise levels: what
/// `ditattn compare` compares the backends on.
class Capture {
 public:
  /// Chooses the steps nearest to t = 0.95, 0.65, 0.35 and 0.05.
  Capture(const ModelConfig& config, const SamplerOptions& options);

  /// Records where the step and the batch are wanted; null elsewhere. As StepObserver.
  AttentionObserver at(std::int64_t step, std::int64_t first_image);

  /// Writes cases named by noise level, `digits t=0.95.query` (blocks, tokens, heads, head size) and so on.
  /// `made_by` says with which backend and from which noise.
  void save(const std::filesystem::path& file, const std::string& made_by) const;

 private:
  ModelConfig config_;
  std::int64_t steps_;
  std::map<std::int64_t, std::string> cases_;  // by step
  ditattn::SafetensorsFile content_;
};

}  // namespace digits
