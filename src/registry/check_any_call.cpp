#include "registry/check_any_call.hpp"

#include "registry/check_call.hpp"

namespace ditattn {
namespace {

// A class that takes everything and does nothing: the library's own checks of a call, without an engine behind them.
class Anybody final : public AttentionBackend {
 public:
  explicit Anybody(CausalAlignment alignment) { can_.causal_alignment = alignment; }
  [[nodiscard]] std::string get_name() const override { return "ditattn"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return can_; }
  [[nodiscard]] Verdict explain(const Problem& /*problem*/) const override { return {}; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    class Nothing final : public AttentionImpl {
     public:
      using AttentionImpl::AttentionImpl;
      void run(const AttentionCall& /*call*/) const override {}
    };
    return std::make_unique<Nothing>(config);
  }

 private:
  Capabilities can_;
};

}  // namespace

Problem check_any_call(const ImplConfig& config, const Tensor& query, const Tensor& key, const Tensor& value,
                       const AttentionMetadata& metadata, CausalAlignment alignment) {
  return check_call(*std::make_shared<const Anybody>(alignment)->make(config), query, key, value, metadata);
}

}  // namespace ditattn
