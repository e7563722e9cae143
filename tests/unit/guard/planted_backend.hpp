#pragma once

/// A back end that gives the oracle's numbers, and then spoils them as it is told.

#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "backends/reference/reference.hpp"
#include "ditattn/backend.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn::testing {

/// Changes a call's output; `count` is the number of calls before it, of all layers of the back end.
using Spoil = std::function<void(const AttentionCall& call, std::uint64_t count)>;

inline double element(const Tensor& out, std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) {
  return load_element(data_pointer(out), b * out.stride(0) + i * out.stride(1) + h * out.stride(2) + d, out.dtype());
}
inline void set_element(const Tensor& out, std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d,
                        double value) {
  store_element(data_pointer(out), b * out.stride(0) + i * out.stride(1) + h * out.stride(2) + d, out.dtype(), value);
}

/// Calls `body(b, i, h, d)` for all elements of (B, Sq, H, D).
template <class Body>
void for_each_element(const Tensor& out, const Body& body) {
  for (std::int64_t b = 0; b < out.size(0); ++b) {
    for (std::int64_t i = 0; i < out.size(1); ++i) {
      for (std::int64_t h = 0; h < out.size(2); ++h) {
        for (std::int64_t d = 0; d < out.size(3); ++d) body(b, i, h, d);
      }
    }
  }
}

/// All numbers `factor` times what they are.
inline Spoil times(double factor) {
  return [factor](const AttentionCall& call, std::uint64_t /*count*/) {
    for_each_element(call.out, [&](std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) {
      set_element(call.out, b, i, h, d, factor * element(call.out, b, i, h, d));
    });
  };
}

class PlantedBackend : public AttentionBackend {
 public:
  explicit PlantedBackend(std::string name, Spoil spoil = {}, Capabilities can = exact_capabilities())
      : name_(std::move(name)), spoil_(std::move(spoil)), can_(std::move(can)) {}

  static Capabilities exact_capabilities() {
    Capabilities can = toy_capabilities();
    can.packed = can.joint = true;
    can.masks = {"padding", "bool", "additive", "spans"};
    return can;
  }

  [[nodiscard]] std::string get_name() const override { return name_; }
  [[nodiscard]] const Capabilities& capabilities() const override { return can_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<Impl>(config, *this);
  }

 private:
  class Impl final : public AttentionImpl {
   public:
    Impl(const ImplConfig& config, const PlantedBackend& planted) : AttentionImpl(config), planted_(planted) {}

    void run(const AttentionCall& call) const override {
      const reference::Result answer =
          reference::attention(call.query, call.key, call.value, call.metadata, softmax_scale(), config().causal,
                               planted_.can_.causal_alignment);
      const std::int64_t heads = call.out.size(2);
      const std::int64_t rows = call.out.size(1);
      for_each_element(call.out, [&](std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) {
        const std::int64_t row = (b * heads + h) * rows + i;
        set_element(call.out, b, i, h, d, answer.out[static_cast<std::size_t>(row * call.out.size(3) + d)]);
        if (call.lse.defined()) {
          store_element(data_pointer(call.lse),
                        b * call.lse.stride(0) + h * call.lse.stride(1) + i * call.lse.stride(2), kFloat32,
                        answer.lse[static_cast<std::size_t>(row)]);
        }
      });
      if (planted_.spoil_) planted_.spoil_(call, planted_.calls_++);
    }

   private:
    const PlantedBackend& planted_;  // every implementation keeps its class alive
  };

  std::string name_;
  Spoil spoil_;
  Capabilities can_;
  mutable std::atomic<std::uint64_t> calls_ = 0;
};

}  // namespace ditattn::testing
