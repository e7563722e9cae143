#include "backends/cudnn_attn/sdpa_graph.hpp"

#include <cudnn_frontend.h>
#include <ditattn/errors.hpp>
#include <dlfcn.h>
#include <fmt/format.h>

#include <bit>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>

#include "kernels/cuda/launch_impl.hpp"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // what its dynamic loading asks for
}

namespace ditattn::cudnn {
namespace {

namespace fe = cudnn_frontend;

constexpr std::size_t kKeptPlans = 256;

enum Uid : std::int64_t {
  kQuery = 1,
  kKey,
  kValue,
  kOut,
  kLse,
  kBias,
  kQueryLengths,
  kKeyLengths,
  kQueryOffsets,
  kKeyOffsets,
  kValueOffsets,
  kOutOffsets,
  kFp8Scales,  // and on, in the order of Fp8Scales
  kLastUid = kFp8Scales + 7
};

struct Library {
  std::int64_t version = 0;
  std::string problem;

  Library() {
    void* handle = ::dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      problem = ::dlerror();
      return;
    }
    fe::cudnn_dlhandle = handle;
    version = static_cast<std::int64_t>(fe::detail::get_backend_version());
  }
};

const Library& library() {
  static const Library opened;
  return opened;
}

void check(fe::error_t status, const SdpaSpec& spec, const char* what) {
  if (status.is_good()) return;
  throw NotImplementedError(
      fmt::format("CUDNN_ATTN: cuDNN {} cannot {} for (batch {}, heads {}/{}, queries {}, keys {}, "
                  "head_size {}): {}. Select TORCH_SDPA or another backend for this shape.",
                  version(), what, spec.batch, spec.heads, spec.kv_heads, spec.rows, spec.keys, spec.head_size,
                  status.get_message()));
}

// cuDNN's handle of this thread for a device, the current one, set to `stream`: not to be shared among threads at once.
cudnnHandle_t handle_of(int device, void* stream) {
  struct Handle {
    cudnnHandle_t handle = nullptr;
    void* stream = nullptr;
  };
  struct Handles {
    std::map<int, Handle> of_device;
    ~Handles() {
      try {
        for (const auto& [device, of] : of_device) fe::detail::destroy_handle(of.handle);
      } catch (const std::exception&) {  // where cuDNN lacks the function: a thread that ends must not end the process
      }
    }
  };
  thread_local Handles handles;
  Handle& of = handles.of_device[device];
  if (of.handle == nullptr) {
    const cudnnStatus_t status = fe::detail::create_handle(&of.handle);
    if (status != CUDNN_STATUS_SUCCESS) {
      of.handle = nullptr;
      throw ImportError(
          fmt::format("CUDNN_ATTN: cuDNN does not start on cuda:{}: {}", device, fe::detail::get_error_string(status)));
    }
  }
  if (of.stream != stream) {
    const cudnnStatus_t status = fe::detail::set_stream(of.handle, static_cast<cudaStream_t>(stream));
    if (status != CUDNN_STATUS_SUCCESS) {
      throw Error("RuntimeError",
                  fmt::format("CUDNN_ATTN: cudnnSetStream failed: {}", fe::detail::get_error_string(status)));
    }
    of.stream = stream;
  }
  return of.handle;
}

class GraphPlan final : public SdpaPlan {
 public:
  explicit GraphPlan(const SdpaSpec& spec) : spec_(spec) {
    const kernels::cuda::OnDevice on_device(spec.device);
    graph_.set_sm_version(spec.compute_capability);  // before sdpa(), which asks the current device otherwise
    graph_.set_io_data_type(io_type())
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const auto query = tensor("query", kQuery, spec.heads, spec.rows, spec.query_strides);
    const auto key = tensor("key", kKey, spec.kv_heads, spec.keys, spec.key_strides);
    const auto value = tensor("value", kValue, spec.kv_heads, spec.keys, spec.value_strides);
    if (spec.packed) {
      query->set_ragged_offset(offsets("query_offsets", kQueryOffsets));
      key->set_ragged_offset(offsets("key_offsets", kKeyOffsets));
      value->set_ragged_offset(offsets("value_offsets", kValueOffsets));
    }
    auto options = fe::graph::SDPA_attributes().set_name("sdpa").set_generate_stats(spec.lse).set_attn_scale(
        std::bit_cast<float>(spec.scale_bits));
    if (spec.causal) {
      options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    }
    if (spec.lengths) {
      options.set_padding_mask(true)
          .set_seq_len_q(lengths("query_lengths", kQueryLengths))
          .set_seq_len_kv(lengths("key_lengths", kKeyLengths));
    }
    if (spec.bias_batch > 0) options.set_bias(bias());
    const auto [out, lse] =
        spec.fp8 ? fp8_attention(query, key, value, options) : graph_.sdpa(query, key, value, options);
    out->set_output(true).set_uid(kOut).set_dim(sizes(spec.heads, spec.rows)).set_stride(strides(spec.out_strides));
    if (spec.packed) out->set_ragged_offset(offsets("out_offsets", kOutOffsets));
    if (spec.lse) {
      lse->set_output(true).set_uid(kLse).set_data_type(fe::DataType_t::FLOAT);
      lse->set_dim({spec.batch, spec.heads, spec.rows, 1}).set_stride({spec.heads * spec.rows, spec.rows, 1, 1});
    }
    const std::vector<fe::HeurMode_t> modes = {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK};
    const auto built = spec.autotune ? fe::BuildPlanPolicy_t::ALL : fe::BuildPlanPolicy_t::HEURISTICS_CHOICE;
    check(graph_.build(handle_of(spec.device, nullptr), modes, built), spec, "plan attention");
    if (spec.autotune) {
      workspace_bytes_ = graph_.get_autotune_workspace_size();
    } else {
      check(graph_.get_workspace_size(workspace_bytes_), spec, "tell its workspace");
    }
  }

  [[nodiscard]] std::int64_t workspace_bytes() const override { return workspace_bytes_; }

  void run(const SdpaPointers& pointers, void* stream) const override {
    const kernels::cuda::OnDevice on_device(spec_.device);
    cudnnHandle_t handle = handle_of(spec_.device, stream);
    Pack pack;
    pack.add(kQuery, pointers.query);
    pack.add(kKey, pointers.key);
    pack.add(kValue, pointers.value);
    pack.add(kOut, pointers.out);
    if (spec_.lse) pack.add(kLse, pointers.lse);
    if (spec_.bias_batch > 0) pack.add(kBias, pointers.bias);
    if (spec_.lengths) {
      pack.add(kQueryLengths, pointers.query_lengths);
      pack.add(kKeyLengths, pointers.key_lengths);
    }
    if (spec_.packed) {
      for (int i = 0; i < 4; ++i) {
        pack.add(static_cast<Uid>(kQueryOffsets + i), pointers.offsets + i * (spec_.batch + 1));
      }
    }
    if (spec_.fp8) {
      for (int i = 0; i < 8; ++i) {
        pack.add(static_cast<Uid>(kFp8Scales + i), reinterpret_cast<float*>(pointers.fp8_scales) + i);
      }
    }
    if (spec_.autotune) std::call_once(tuned_, [&] { tune(handle, pack, pointers.workspace); });
    check(graph_.execute(handle, pack.pointers.data(), pack.count, pointers.workspace), spec_, "run attention");
  }

 private:
  using TensorAttributes = fe::graph::Tensor_attributes;

  // What a run is given, in the order of the numbers, as cuDNN wants it.
  struct Pack {
    std::array<void*, kLastUid> pointers{};
    std::array<std::int64_t, kLastUid> uids{};
    int count = 0;
    void add(Uid uid, const void* pointer) {
      uids[static_cast<std::size_t>(count)] = uid;
      pointers[static_cast<std::size_t>(count++)] = const_cast<void*>(pointer);
    }
  };

  using Tensor = std::shared_ptr<TensorAttributes>;
  std::array<Tensor, 2> fp8_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const fe::graph::SDPA_attributes& options) {
    for (const Tensor& tensor : {query, key, value}) tensor->set_data_type(fe::DataType_t::FP8_E4M3);
    const auto scale = [&](const char* name, int place) {
      return numbers(name, static_cast<Uid>(kFp8Scales + place), 1, fe::DataType_t::FLOAT);
    };
    const auto [out, lse, largest_probability, largest_out] = graph_.sdpa_fp8(
        query, key, value, scale("query_descale", 0), scale("key_descale", 1), scale("value_descale", 2),
        scale("probability_descale", 3), scale("probability_scale", 4), scale("out_scale", 5), options);
    for (const auto& [tensor, place] : {std::pair(largest_probability, 6), std::pair(largest_out, 7)}) {
      tensor->set_output(true).set_uid(kFp8Scales + place).set_data_type(fe::DataType_t::FLOAT);
      tensor->set_dim({1, 1, 1, 1}).set_stride({1, 1, 1, 1});
    }
    if (spec_.fp8_out) out->set_data_type(fe::DataType_t::FP8_E4M3);
    return {out, lse};
  }

  void tune(cudnnHandle_t handle, const Pack& pack, void* workspace) const {
    std::unordered_map<std::int64_t, void*> named;
    for (int i = 0; i < pack.count; ++i) {
      named.emplace(pack.uids[static_cast<std::size_t>(i)], pack.pointers[static_cast<std::size_t>(i)]);
    }
    check(graph_.autotune(handle, named, workspace), spec_, "time its candidates");
  }

  [[nodiscard]] std::vector<std::int64_t> sizes(std::int64_t heads, std::int64_t tokens) const {
    return {spec_.batch, heads, tokens, spec_.head_size};
  }
  // cuDNN's order: batch, heads, tokens, channels.
  [[nodiscard]] static std::vector<std::int64_t> strides(const std::array<std::int64_t, 3>& of) {
    return {of[0], of[2], of[1], 1};
  }
  std::shared_ptr<TensorAttributes> tensor(const char* name, Uid uid, std::int64_t heads, std::int64_t tokens,
                                           const std::array<std::int64_t, 3>& of) {
    return graph_.tensor(
        TensorAttributes().set_name(name).set_uid(uid).set_dim(sizes(heads, tokens)).set_stride(strides(of)));
  }
  std::shared_ptr<TensorAttributes> numbers(const char* name, Uid uid, std::int64_t count, fe::DataType_t type) {
    return graph_.tensor(TensorAttributes()
                             .set_name(name)
                             .set_uid(uid)
                             .set_dim({count, 1, 1, 1})
                             .set_stride({1, 1, 1, 1})
                             .set_data_type(type));
  }
  std::shared_ptr<TensorAttributes> lengths(const char* name, Uid uid) {
    return numbers(name, uid, spec_.batch, fe::DataType_t::INT32);
  }
  std::shared_ptr<TensorAttributes> offsets(const char* name, Uid uid) {
    return numbers(name, uid, spec_.batch + 1, fe::DataType_t::INT64);
  }
  std::shared_ptr<TensorAttributes> bias() {
    return graph_.tensor(TensorAttributes()
                             .set_name("bias")
                             .set_uid(kBias)
                             .set_dim({spec_.bias_batch, spec_.bias_heads, spec_.rows, spec_.keys})
                             .set_stride(strides(spec_.bias_strides))
                             .set_data_type(spec_.bias_float32 ? fe::DataType_t::FLOAT : io_type()));
  }
  [[nodiscard]] fe::DataType_t io_type() const {
    return spec_.bfloat16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
  }

  SdpaSpec spec_;
  mutable fe::graph::Graph graph_;  // autotune() alone changes it, before others run
  mutable std::once_flag tuned_;
  std::int64_t workspace_bytes_ = 0;
};

// A plan, or why there is none.
struct Slot {
  std::once_flag once;
  std::shared_ptr<const SdpaPlan> plan;
  std::string refusal;
};

// The slots used last.
class Slots {
 public:
  std::shared_ptr<Slot> find(const SdpaSpec& spec) {
    const std::lock_guard lock(mutex_);
    if (const auto found = places_.find(spec); found != places_.end()) {
      used_.splice(used_.begin(), used_, found->second);
      return found->second->second;
    }
    used_.emplace_front(spec, std::make_shared<Slot>());
    places_.emplace(spec, used_.begin());
    if (used_.size() > kKeptPlans) {
      places_.erase(used_.back().first);
      used_.pop_back();
    }
    return used_.front().second;
  }

 private:
  using Entries = std::list<std::pair<SdpaSpec, std::shared_ptr<Slot>>>;
  std::mutex mutex_;
  Entries used_;
  std::map<SdpaSpec, Entries::iterator> places_;
};

}  // namespace

std::int64_t version() { return library().version; }
const std::string& problem() { return library().problem; }

std::shared_ptr<const SdpaPlan> sdpa_plan(const SdpaSpec& spec) {
  library();                         // opened before the first plan
  static Slots& slots = *new Slots;  // never destroyed: cuDNN may be gone before it
  const std::shared_ptr<Slot> slot = slots.find(spec);
  std::call_once(slot->once, [&] {
    try {
      slot->plan = std::make_shared<GraphPlan>(spec);
    } catch (const NotImplementedError& error) {
      slot->refusal = error.message();
    }
  });
  if (!slot->refusal.empty()) throw NotImplementedError(slot->refusal);
  return slot->plan;
}

}  // namespace ditattn::cudnn
