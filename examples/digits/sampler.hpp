#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <vector>

#include "model.hpp"

namespace digits {

/// What sampling starts from, and, once sampled, the pictures: one per class asked for.
struct Images {
  std::vector<std::int64_t> classes;
  std::vector<float> pixels;  ///< (classes.size(), tokens)
};

/// Standard normal noise, and the classes 0, 1, …, 9, 0, …; the same for the same seed.
Images draw_noise(const ModelConfig& config, std::int64_t seed, std::int64_t count);

/// `noise` and `labels` of a file that train.py --sample or save_samples wrote; the first `count`, or all.
/// ditattn::FileError for missing tensors, wrong shapes or dtypes, classes out of range, NaN or Inf.
Images load_noise(const std::filesystem::path& file, const ModelConfig& config, std::optional<std::int64_t> count);

struct SamplerOptions {
  std::int64_t steps = 40;
  double guidance = 2;
};

/// Notified before each step of each batch; what it returns, if anything, sees that step's attention calls. Query,
/// key and value hold the batch's images with their classes, then the same images with no class.
using StepObserver = std::function<AttentionObserver(std::int64_t step, std::int64_t first_image)>;

/// Euler's method from t = 1 (noise) to 0 along the guided velocity. Pixels of the result are 0 … 16.
Images sample(Model& model, const AttentionLayers& attention, const Images& noise, const SamplerOptions& options,
              const StepObserver& observe);

/// Writes `samples`, `labels` and `noise` as train.py --sample does and score.py reads.
void save_samples(const std::filesystem::path& file, const ModelConfig& config, const Images& samples,
                  const Images& noise, const SamplerOptions& options);

}  // namespace digits
