#pragma once

#include <ditattn/ditattn.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "weights.hpp"

namespace digits {

/// One attention layer per block, from any backend of the registry.
using AttentionLayers = std::vector<std::unique_ptr<ditattn::AttentionImpl>>;

AttentionLayers make_attention_layers(const ditattn::AttentionBackend& backend, const ModelConfig& config);

/// Sees what a block's attention is called with: query, key and value, each (images, tokens, heads, head size).
using AttentionObserver = std::function<void(std::int64_t block, const ditattn::Tensor& query,
                                             const ditattn::Tensor& key, const ditattn::Tensor& value)>;

/// The diffusion transformer of README.md. Keeps its working memory: one call at a time.
class Model {
 public:
  explicit Model(Weights weights) : weights_(std::move(weights)) {}

  [[nodiscard]] const ModelConfig& config() const { return weights_.config; }

  /// dx/dt of noisy images `x` (images, tokens) at time `t`, one class per image; written to `velocity`, of x's size.
  void velocity(std::span<const float> x, float t, std::span<const std::int64_t> classes,
                const AttentionLayers& attention, std::span<float> velocity, const AttentionObserver& observe = {});

 private:
  void reserve(std::int64_t images);
  [[nodiscard]] std::vector<float> time_embedding(float t) const;
  void condition(float t, std::span<const std::int64_t> classes);
  void embed(std::span<const float> x);
  void project_qkv(const BlockWeights& block);
  void attend(std::int64_t block, const AttentionLayers& attention, const AttentionObserver& observe);
  void finish_block(const BlockWeights& block);
  void project_out(std::span<float> velocity);

  Weights weights_;
  std::int64_t images_ = 0;        // of the call under way; the buffers' first dimension
  std::vector<float> condition_;   // (images, dim)
  std::vector<float> modulation_;  // (images, 6, dim): shift, scale, gate of attention, then of the MLP
  std::vector<float> modulated_;   // (images, 6, dim): the same with a block's table added
  std::vector<float> h_;           // (images, tokens, dim)
  std::vector<float> normed_;      // (images, tokens, dim)
  std::vector<float> qkv_;         // (images, tokens, 3, heads, head size)
  std::vector<float> attended_;    // (images, tokens, heads, head size)
  std::vector<float> hidden_;      // (images, tokens, mlp_dim)
  std::vector<float> added_;       // (images, tokens, dim): what a gate is about to add
};

}  // namespace digits
