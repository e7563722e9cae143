#include "model.hpp"

#include <fmt/format.h>

#include <cmath>

namespace digits {
namespace {

// Rows of the modulation, six per image, and of a block's table.
enum Modulation { kShift1, kScale1, kGate1, kShift2, kScale2, kGate2 };

// body(image) for every image, on ditattn's threads. One image is 64 rows: enough for OpenBLAS to work well, and it
// shares the work evenly. The body must not throw, hence the buffers made beforehand.
template <class Body>
void for_each_image(std::int64_t images, const Body& body) {
  ditattn::parallel_for(
      images, [](void* context, std::int64_t image) { (*static_cast<const Body*>(context))(image); },
      const_cast<Body*>(&body));
}

}  // namespace

AttentionLayers make_attention_layers(const ditattn::AttentionBackend& backend, const ModelConfig& config) {
  AttentionLayers layers;
  for (std::int64_t block = 0; block < config.blocks; ++block) {
    layers.push_back(backend.make({.num_heads = config.heads,
                                   .head_size = config.head_size(),
                                   .prefix = fmt::format("blocks.{}.attention", block)}));
  }
  return layers;
}

void Model::velocity(std::span<const float> x, float t, std::span<const std::int64_t> classes,
                     const AttentionLayers& attention, std::span<float> velocity, const AttentionObserver& observe) {
  reserve(static_cast<std::int64_t>(classes.size()));
  condition(t, classes);
  embed(x);
  for (std::int64_t block = 0; block < config().blocks; ++block) {
    project_qkv(weights_.blocks[block]);
    attend(block, attention, observe);
    finish_block(weights_.blocks[block]);
  }
  project_out(velocity);
}

void Model::reserve(std::int64_t images) {
  images_ = images;
  const std::int64_t dim = config().dim;
  const std::int64_t rows = images * config().tokens();
  condition_.resize(images * dim);
  modulation_.resize(images * 6 * dim);
  modulated_.resize(images * 6 * dim);
  for (std::vector<float>* buffer : {&h_, &normed_, &attended_, &added_}) buffer->resize(rows * dim);
  qkv_.resize(rows * 3 * dim);
  hidden_.resize(rows * config().mlp_dim);
}

std::vector<float> Model::time_embedding(float t) const {
  const std::int64_t half = config().time_dim / 2;
  std::vector<float> features(2 * half);
  for (std::int64_t i = 0; i < half; ++i) {
    const double angle = 1000.0 * t * std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
    features[i] = static_cast<float>(std::cos(angle));
    features[half + i] = static_cast<float>(std::sin(angle));
  }
  std::vector<float> hidden(config().dim);
  std::vector<float> embedding(config().dim);
  weights_.time1(features.data(), 1, hidden.data());
  silu(hidden.data(), config().dim);
  weights_.time2(hidden.data(), 1, embedding.data());
  return embedding;
}

void Model::condition(float t, std::span<const std::int64_t> classes) {
  const std::int64_t dim = config().dim;
  const std::vector<float> time = time_embedding(t);
  for (std::int64_t image = 0; image < images_; ++image) {
    const float* label = weights_.label.data() + classes[image] * dim;
    for (std::int64_t i = 0; i < dim; ++i) condition_[image * dim + i] = time[i] + label[i];
  }
  std::vector<float> active = condition_;
  silu(active.data(), images_ * dim);
  weights_.modulation(active.data(), images_, modulation_.data());
}

void Model::embed(std::span<const float> x) {
  const std::int64_t dim = config().dim;
  for (std::int64_t row = 0; row < images_ * config().tokens(); ++row) {
    const float* position = weights_.pos.data() + row % config().tokens() * dim;
    for (std::int64_t i = 0; i < dim; ++i) {
      h_[row * dim + i] = x[row] * weights_.patch.weight[i] + weights_.patch.bias[i] + position[i];
    }
  }
}

void Model::project_qkv(const BlockWeights& block) {
  const std::int64_t dim = config().dim;
  const std::int64_t tokens = config().tokens();
  for_each_image(images_, [&](std::int64_t image) {
    float* m = modulated_.data() + image * 6 * dim;
    for (std::int64_t i = 0; i < 6 * dim; ++i) m[i] = modulation_[image * 6 * dim + i] + block.table[i];
    float* normed = normed_.data() + image * tokens * dim;
    modulated_norm(h_.data() + image * tokens * dim, tokens, dim, m + kShift1 * dim, m + kScale1 * dim, normed);
    block.qkv(normed, tokens, qkv_.data() + image * tokens * 3 * dim);
  });
}

// Query, key and value stay where the linear layer left them: every third row of heads, as strides say.
void Model::attend(std::int64_t block, const AttentionLayers& attention, const AttentionObserver& observe) {
  const ModelConfig& c = config();
  const auto part = [&](std::int64_t which) {
    return ditattn::wrap(qkv_.data() + which * c.dim, {images_, c.tokens(), c.heads, c.head_size()}, ditattn::kFloat32,
                         {c.tokens() * 3 * c.dim, 3 * c.dim, c.head_size(), 1});
  };
  const ditattn::Tensor query = part(0);
  const ditattn::Tensor key = part(1);
  const ditattn::Tensor value = part(2);
  const ditattn::Tensor out =
      ditattn::wrap(attended_.data(), {images_, c.tokens(), c.heads, c.head_size()}, ditattn::kFloat32);
  if (observe) observe(block, query, key, value);
  attention[block]->forward(query, key, value, {}, {.out = out});
}

void Model::finish_block(const BlockWeights& block) {
  const std::int64_t dim = config().dim;
  const std::int64_t tokens = config().tokens();
  const std::int64_t mlp_dim = config().mlp_dim;
  for_each_image(images_, [&](std::int64_t image) {
    const float* m = modulated_.data() + image * 6 * dim;
    float* h = h_.data() + image * tokens * dim;
    float* normed = normed_.data() + image * tokens * dim;
    float* hidden = hidden_.data() + image * tokens * mlp_dim;
    float* added = added_.data() + image * tokens * dim;
    block.out(attended_.data() + image * tokens * dim, tokens, added);
    add_gated(h, added, tokens, dim, m + kGate1 * dim);
    modulated_norm(h, tokens, dim, m + kShift2 * dim, m + kScale2 * dim, normed);
    block.fc1(normed, tokens, hidden);
    gelu(hidden, tokens * mlp_dim);
    block.fc2(hidden, tokens, added);
    add_gated(h, added, tokens, dim, m + kGate2 * dim);
  });
}

void Model::project_out(std::span<float> velocity) {
  const std::int64_t dim = config().dim;
  const std::int64_t tokens = config().tokens();
  for_each_image(images_, [&](std::int64_t image) {
    float* m = modulated_.data() + image * 6 * dim;  // two rows of it: shift and scale
    for (std::int64_t i = 0; i < 2 * dim; ++i) m[i] = condition_[image * dim + i % dim] + weights_.final_table[i];
    float* normed = normed_.data() + image * tokens * dim;
    modulated_norm(h_.data() + image * tokens * dim, tokens, dim, m, m + dim, normed);
    weights_.head(normed, tokens, velocity.data() + image * tokens);
  });
}

}  // namespace digits
