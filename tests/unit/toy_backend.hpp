#pragma once

/// A backend small enough to check by hand: every output element is `factor` times the mean over the keys of its
/// head's V, whatever the query (softmax with all logits equal), and the LSE is log(Skv).

#include <cmath>
#include <memory>
#include <string>
#include <utility>

#include "ditattn/backend.hpp"

namespace ditattn::testing {

inline Capabilities toy_capabilities() {
  return {.engine = "mean of V",
          .devices = {"cpu"},
          .dtypes = {kFloat32, kFloat16, kBFloat16},
          .head_sizes = {},
          .masks = {"padding", "bool", "additive"},
          .gqa = true,
          .causal = true,
          .lse = true};
}

class ToyImpl final : public AttentionImpl {
 public:
  ToyImpl(const ImplConfig& config, double factor) : AttentionImpl(config), factor_(factor) {}

  void run(const AttentionCall& call) const override {
    const std::int64_t heads = call.query.size(2);
    for (std::int64_t b = 0; b < call.query.size(0); ++b) {
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t kv_head = h / (heads / call.key.size(2));
        for (std::int64_t d = 0; d < call.query.size(3); ++d) {
          const double mean = mean_of(call.value, b, kv_head, d);
          for (std::int64_t i = 0; i < call.query.size(1); ++i) {
            store_element(data_pointer(call.out), offset(call.out, b, i, h, d), call.out.dtype(), factor_ * mean);
          }
        }
        if (call.lse.defined()) fill_lse(call, b, h);
      }
    }
  }

 private:
  static std::int64_t offset(const Tensor& tensor, std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) {
    return b * tensor.stride(0) + i * tensor.stride(1) + h * tensor.stride(2) + d * tensor.stride(3);
  }
  static double mean_of(const Tensor& value, std::int64_t b, std::int64_t head, std::int64_t d) {
    double sum = 0;
    for (std::int64_t j = 0; j < value.size(1); ++j) {
      sum += load_element(data_pointer(value), offset(value, b, j, head, d), value.dtype());
    }
    return sum / static_cast<double>(value.size(1));
  }
  static void fill_lse(const AttentionCall& call, std::int64_t b, std::int64_t h) {
    for (std::int64_t i = 0; i < call.query.size(1); ++i) {
      const std::int64_t at = b * call.lse.stride(0) + h * call.lse.stride(1) + i * call.lse.stride(2);
      store_element(data_pointer(call.lse), at, kFloat32, std::log(static_cast<double>(call.key.size(1))));
    }
  }

  double factor_;
};

class ToyBackend : public AttentionBackend {
 public:
  explicit ToyBackend(std::string name = "TOY", double factor = 1, Capabilities can = toy_capabilities())
      : name_(std::move(name)), factor_(factor), can_(std::move(can)) {}

  [[nodiscard]] std::string get_name() const override { return name_; }
  [[nodiscard]] const Capabilities& capabilities() const override { return can_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<ToyImpl>(config, factor_);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {"known"}; }

 private:
  std::string name_;
  double factor_;
  Capabilities can_;
};

/// A contiguous tensor whose element i is `first + i`.
inline Tensor counting(std::initializer_list<std::int64_t> shape, DLDataType dtype = kFloat32, double first = 0) {
  Tensor tensor = empty(shape, dtype);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    store_element(data_pointer(tensor), i, dtype, first + static_cast<double>(i));
  }
  return tensor;
}

/// Forwards V = 0, 1, …, 5 of shape (1, 3, 2, 1) and returns head 1's output: 3 times the backend's factor.
inline double toy_answer(const AttentionBackend& backend) {
  const auto attention = backend.make({.num_heads = 2, .head_size = 1});
  const Tensor out = attention->forward(counting({1, 2, 2, 1}), counting({1, 3, 2, 1}), counting({1, 3, 2, 1}));
  return load_element(data_pointer(out), 1, kFloat32);
}

}  // namespace ditattn::testing
