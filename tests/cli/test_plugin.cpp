// Backends for the tests of the command line, under the class names of real members: one that is exact, others that
// misbehave in one way each.

#include <ditattn/errors.hpp>
#include <ditattn/plugin.hpp>

#include <chrono>
#include <cstring>
#include <map>
#include <stdexcept>
#include <thread>

#include "backends/reference/reference.hpp"

namespace {

using namespace ditattn;

using Compute = void (*)(const AttentionCall& call, const AttentionImpl& impl);

// What one stand-in is.
struct Behaviour {
  const char* name;
  Compute compute;
  HeadSizes head_sizes = {};
  std::vector<std::string> masks = {};
  const char* unavailable_because = nullptr;
};

void write_exact(const AttentionCall& call, const AttentionImpl& impl) {
  const auto result = reference::attention(call.query, call.key, call.value, call.metadata, impl.softmax_scale(),
                                           impl.config().causal, impl.backend().capabilities().causal_alignment);
  const std::int64_t seq = call.out.size(1);
  const std::int64_t heads = call.out.size(2);
  const std::int64_t size = call.out.size(3);
  for (std::int64_t i = 0; i < call.out.numel(); ++i) {  // over (batch, head, query, d)
    const std::int64_t row = i / size;
    const std::int64_t at = ((row / seq / heads * seq + row % seq) * heads + row / seq % heads) * size + i % size;
    store_element(call.out.data_ptr(), at, call.out.dtype(), result.out[static_cast<std::size_t>(i)]);
  }
}

void write_zeros(const AttentionCall& call, const AttentionImpl& /*impl*/) {
  std::memset(call.out.data_ptr(), 0, tvm::ffi::GetDataSize(*call.out.GetDLTensorPtr()));
}

// Takes its time, so that progress has something to show.
void write_nothing(const AttentionCall& /*call*/, const AttentionImpl& /*impl*/) {
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

// Also of a good head size where it gets one head alone, as one of several ranks may.
void throw_error(const AttentionCall& call, const AttentionImpl& impl) {
  if (call.query.size(3) == 128 && call.query.size(2) > 1) return write_exact(call, impl);
  throw std::runtime_error("the engine broke down");
}

class StandIn final : public AttentionBackend {
 public:
  explicit StandIn(Behaviour behaviour) : behaviour_(std::move(behaviour)) {
    capabilities_.engine = "stand-in for tests";
    capabilities_.devices = {"cpu"};
    capabilities_.dtypes = {kFloat32, kFloat16, kBFloat16};
    capabilities_.head_sizes = behaviour_.head_sizes;
    capabilities_.masks = behaviour_.masks;
    capabilities_.gqa = capabilities_.causal = true;
    capabilities_.causal_alignment = CausalAlignment::top_left;
  }
  [[nodiscard]] std::string get_name() const override { return behaviour_.name; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }
  void validate_available() const override {
    if (behaviour_.unavailable_because != nullptr) throw ImportError(behaviour_.unavailable_because);
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    class Impl final : public AttentionImpl {
     public:
      Impl(const ImplConfig& impl_config, Compute compute) : AttentionImpl(impl_config), compute_(compute) {}
      void run(const AttentionCall& call) const override { compute_(call, *this); }

     private:
      Compute compute_;
    };
    return std::make_unique<Impl>(config, behaviour_.compute);
  }

 private:
  Behaviour behaviour_;
  Capabilities capabilities_;
};

BackendClass find(std::string_view class_name) {
  const std::vector<std::string> all_masks = {"padding", "bool", "additive"};
  const std::map<std::string_view, Behaviour> behaviours = {
      {"SDPABackend", {.name = "SDPA", .compute = write_exact, .masks = all_masks}},
      {"SageAttentionBackend", {.name = "SAGE_ATTN", .compute = write_nothing, .masks = all_masks}},
      {"SageAttention3Backend", {.name = "SAGE_ATTN_3", .compute = write_zeros, .masks = all_masks}},
      {"CuDNNAttentionBackend",
       {.name = "CUDNN_ATTN",
        .compute = write_exact,
        .head_sizes = {.list = {}, .min = 8, .max = 256, .multiple = 8},
        .masks = {"padding"},
        .unavailable_because = "CUDNN_ATTN needs a CUDA device; none was found."}},
      {"FlashInferAttentionBackend",
       {.name = "FLASHINFER_ATTN", .compute = throw_error, .head_sizes = {.list = {64, 128, 256}}}},
  };
  const auto found = behaviours.find(class_name);
  return found == behaviours.end() ? nullptr : std::make_shared<StandIn>(found->second);
}

}  // namespace

DITATTN_EXPORT_BACKENDS(find)
