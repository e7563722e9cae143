#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "layers.hpp"

namespace digits {

/// Everything that fixes the shapes; strings in the metadata of the weights file.
struct ModelConfig {
  std::int64_t image_size = 0;
  std::int64_t dim = 0;
  std::int64_t heads = 0;
  std::int64_t blocks = 0;
  std::int64_t mlp_dim = 0;
  std::int64_t time_dim = 0;
  std::int64_t classes = 0;  ///< index `classes` is the null class of guidance

  [[nodiscard]] std::int64_t tokens() const { return image_size * image_size; }
  [[nodiscard]] std::int64_t head_size() const { return dim / heads; }
};

struct BlockWeights {
  std::vector<float> table;  ///< (6, dim)
  Linear qkv, out, fc1, fc2;
};

/// The weights, widened to float32. README.md has the names and what they do.
struct Weights {
  ModelConfig config;
  Linear patch, time1, time2, modulation, head;
  std::vector<float> pos;    ///< (tokens, dim)
  std::vector<float> label;  ///< (classes + 1, dim)
  std::vector<BlockWeights> blocks;
  std::vector<float> final_table;  ///< (2, dim)
};

/// Reads a file that train.py wrote. ditattn::FileError where a size or a tensor is missing, superfluous or of
/// another dtype or shape than the sizes ask for.
Weights load_weights(const std::filesystem::path& file);

}  // namespace digits
