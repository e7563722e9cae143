// A plug-in as an author writes it, with nothing but <ditattn/plugin.hpp>. `Doubler` writes 2·V's first row to every
// row, so that a forward through the table can be checked; asked to by its kwargs or its prefix, it fails.

#include "tests/abi/plugins/good_backends.hpp"

#include <ditattn/errors.hpp>

#include <stdexcept>

using namespace ditattn;

namespace {

// Throws what `what` names; "" throws nothing.
void fail_as(const std::string& what) {
  if (what == "ValueError") throw ValueError("a wrong value");
  if (what == "ImportError") throw ImportError("a missing library");
  if (what == "NotImplementedError") throw NotImplementedError("not on this chip");
  if (what == "MemoryError") throw MemoryError("too large by 1 byte");
  if (what == "KeyError") throw Error("KeyError", "no such key");
  if (what == "runtime_error") throw std::runtime_error("a plain C++ exception");
  if (what == "int") throw 42;
}

class DoublerImpl final : public AttentionImpl {
 public:
  explicit DoublerImpl(const ImplConfig& config) : AttentionImpl(config) {
    if (const auto fail = config.backend_kwargs.Get("fail")) fail_in_run_ = fail->cast<tvm::ffi::String>();
  }
  void run(const AttentionCall& call) const override {
    fail_as(fail_in_run_);
    const auto* value = static_cast<const float*>(data_pointer(call.value));
    auto* out = static_cast<float*>(data_pointer(call.out));
    for (std::int64_t i = 0; i < call.out.numel(); ++i) {
      out[i] =
          2 * value[i % (call.out.size(2) * call.out.size(3))] + static_cast<float>(config().softmax_scale.value_or(0));
    }
    if (call.lse.defined()) {
      for (std::int64_t i = 0; i < call.lse.numel(); ++i) {
        static_cast<float*>(data_pointer(call.lse))[i] =
            call.plan(false, CausalAlignment::bottom_right).keys[0].mask.data != nullptr ? 1.F : -1.F;
      }
    }
  }

 private:
  std::string fail_in_run_;
};

class Doubler : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "DOUBLER"; }
  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can{.engine = "twice the first row",
                                  .devices = {"cpu"},
                                  .dtypes = {kFloat32},
                                  .head_sizes = {},
                                  .masks = {"padding", "bool"},
                                  .lse = true};
    return can;
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    fail_as(config.prefix);
    return std::make_unique<DoublerImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {"fail"}; }
};

// Every capability set, and a verdict of its own.
class Odd final : public Doubler {
 public:
  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can = odd_capabilities();
    return can;
  }
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict;
    if (problem.seq_kv == 1) verdict.reasons = {"one key is too few", "and so is one reason"};
    return verdict;
  }
  [[nodiscard]] std::string kernel_name(const Problem& problem) const override {
    return "odd kernel of " + std::to_string(problem.seq_kv);
  }
};

// Not available on this machine, in a way that its name says.
template <int kind>
class Unavailable final : public Doubler {
 public:
  void validate_available() const override {
    static constexpr const char* kKinds[] = {"ImportError", "runtime_error", "int"};
    fail_as(kKinds[kind]);
  }
};

}  // namespace

Capabilities odd_capabilities() {
  return {.engine = "odd \xC3\xA4",
          .devices = {"cuda", "cpu"},
          .dtypes = {kBFloat16, kFloat64, kFloat16},
          .head_sizes = {.list = {3, 1, 4}, .min = 2, .max = 96, .multiple = 16},
          .masks = {"spans", "additive"},
          .gqa = true,
          .causal = true,
          .causal_alignment = CausalAlignment::top_left,
          .lse = true,
          .graph_safe = true,
          .masked_nan_propagates = true};
}

BackendClass find_good(std::string_view class_name) {
  if (class_name == "Doubler") return std::make_shared<Doubler>();
  if (class_name == "Odd") return std::make_shared<Odd>();
  if (class_name == "NoLibrary") return std::make_shared<Unavailable<0>>();
  if (class_name == "ThrowsRuntimeError") return std::make_shared<Unavailable<1>>();
  if (class_name == "ThrowsInt") return std::make_shared<Unavailable<2>>();
  return nullptr;
}
