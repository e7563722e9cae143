#pragma once

/// Back ends that compute what the oracle says, and then do one thing wrong.

#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backends/reference/reference.hpp"
#include "ditattn/backend.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn::testing {

inline Capabilities planted_capabilities() {
  Capabilities can = toy_capabilities();
  can.engine = "the oracle, planted";
  can.joint = true;
  return can;
}

/// A number that no random tensor begins with.
inline constexpr double kMark = 1234;

/// What is wrong with one; nothing by default.
struct Plant {
  double error = 0;               ///< every element is this much too large, relative to itself
  std::int64_t nan_row = -1;      ///< of the first head: NaN
  std::int64_t nan_seq = -1;      ///< NaN in everything where the query has this many rows
  bool fears_the_mark = false;    ///< NaN in everything where the query begins with `kMark`
  bool fills_empty_rows = false;  ///< numbers in rows that see no key
  bool writes_nothing = false;
  int throws_at = 0;  ///< the call that throws something that is no error of the library; 0: none
  std::chrono::microseconds delay{0};
  std::string refuses = {};  ///< with this reason
  bool is_unavailable = false;
  Capabilities can = planted_capabilities();
};

class PlantedBackend final : public AttentionBackend {
 public:
  PlantedBackend(std::string name, Plant plant) : name_(std::move(name)), plant_(std::move(plant)) {}

  [[nodiscard]] std::string get_name() const override { return name_; }
  [[nodiscard]] const Capabilities& capabilities() const override { return plant_.can; }
  void validate_available() const override {
    if (plant_.is_unavailable) throw ImportError(name_ + " needs a device of its own");
  }
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict = AttentionBackend::explain(problem);
    if (!plant_.refuses.empty()) verdict.reasons.push_back(plant_.refuses);
    return verdict;
  }
  /// How often it computed, of all its layers.
  [[nodiscard]] int calls() const { return calls_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<Impl>(config, *this);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {"known"}; }

 private:
  class Impl final : public AttentionImpl {
   public:
    Impl(const ImplConfig& config, const PlantedBackend& owner)
        : AttentionImpl(config), plant_(owner.plant_), calls_(owner.calls_) {}

    void run(const AttentionCall& call) const override {
      const int number = ++calls_;
      if (number == plant_.throws_at) throw std::runtime_error("planted");
      std::this_thread::sleep_for(plant_.delay);
      if (plant_.writes_nothing) return;
      const reference::Result right = reference::attention(call.query, call.key, call.value, call.metadata,
                                                           softmax_scale(), config().causal, backend_alignment());
      for (std::int64_t b = 0, row = 0; b < call.out.size(0); ++b) {
        for (std::int64_t h = 0; h < call.out.size(2); ++h) {
          for (std::int64_t i = 0; i < call.out.size(1); ++i, ++row) write_row(call, right, b, h, i, row);
        }
      }
    }

   private:
    [[nodiscard]] CausalAlignment backend_alignment() const { return plant_.can.causal_alignment; }

    void write_row(const AttentionCall& call, const reference::Result& right, std::int64_t b, std::int64_t h,
                   std::int64_t i, std::int64_t row) const {
      const double lse = right.lse[static_cast<std::size_t>(row)];
      const bool is_marked = load_element(data_pointer(call.query), 0, call.query.dtype()) == kMark;
      const bool is_nan = (b == 0 && h == 0 && i == plant_.nan_row) || call.out.size(1) == plant_.nan_seq ||
                          (plant_.fears_the_mark && is_marked);
      for (std::int64_t d = 0; d < call.out.size(3); ++d) {
        double number = right.out[static_cast<std::size_t>(row * call.out.size(3) + d)] * (1 + plant_.error);
        if (is_nan) number = std::numeric_limits<double>::quiet_NaN();
        if (plant_.fills_empty_rows && std::isinf(lse)) number = 1;
        const Tensor& out = call.out;
        store_element(data_pointer(out), b * out.stride(0) + i * out.stride(1) + h * out.stride(2) + d, out.dtype(),
                      number);
      }
      if (!call.lse.defined()) return;
      const std::int64_t at = b * call.lse.stride(0) + h * call.lse.stride(1) + i * call.lse.stride(2);
      store_element(data_pointer(call.lse), at, kFloat32, lse);
    }

    const Plant& plant_;
    std::atomic<int>& calls_;
  };

  std::string name_;
  Plant plant_;
  mutable std::atomic<int> calls_ = 0;
};

}  // namespace ditattn::testing
