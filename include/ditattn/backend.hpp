#pragma once

/// The two interfaces of a backend: the class (`AttentionBackend`) and what it builds for one layer
/// (`AttentionImpl`). Users call them; authors of backends derive from them.

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/metadata.hpp"
#include "ditattn/problem.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// Options by name: strings, numbers, booleans, None.
using BackendKwargs = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

/// What an implementation is built from, once per attention layer.
struct ImplConfig {
  std::int64_t num_heads = 1;                          ///< of query
  std::int64_t head_size = 1;                          ///< of query, key and value
  std::optional<double> softmax_scale = std::nullopt;  ///< none: 1/√head_size
  bool causal = false;  ///< row i sees keys to its diagonal (`Capabilities::causal_alignment`)
  std::optional<std::int64_t> num_kv_heads = std::nullopt;  ///< none: num_heads
  std::string prefix = {};                                  ///< the layer's name, for messages and observers
  std::string role = {};                                    ///< "self", "cross", …, for observers
  BackendKwargs backend_kwargs = {};                        ///< unknown keys: one warning
};

/// Tensors a caller gives to receive results; null means "allocate" (out) or "not wanted" (lse).
struct ForwardOutputs {
  Tensor out = {};  ///< (B, Sq, H, D), query's dtype and device, any non-overlapping strides with a unit last one
  Tensor lse = {};  ///< float32 (B, H, Sq), any non-overlapping strides
};

/// A mask as kernels read it: element (b, h, row − first_row, key) at `strides`, zero where broadcast. Rows outside
/// [first_row, first_row + rows) see everything.
struct MaskView {
  const void* data = nullptr;  ///< null: no mask has to be read
  DLDataType dtype = kBool;    ///< bool: true = attend; a floating type: added to the logits, −∞ hides
  std::array<std::int64_t, 4> strides = {};  ///< in elements: batch, head, row, key
  std::int64_t first_row = 0;                ///< the joined row that the mask's first is
  std::int64_t rows = 0;                     ///< that the mask has
};

/// Query rows [first_row, …) in joined order: `tensor` is (B, rows, H, D).
struct QuerySegment {
  Tensor tensor;               ///< read in place
  std::int64_t first_row = 0;  ///< of `tensor`, in joined order
};

/// Keys [first_key, first_key + keys) in joined order.
struct KeySegment {
  Tensor key;                  ///< (B, ≥ keys, Hkv, D)
  Tensor value;                ///< (B, ≥ keys, Hkv, D)
  std::int64_t first_key = 0;  ///< of `key`, in joined order
  std::int64_t keys = 0;       ///< in this segment
  /// Null: all keys. Else batch entry b sees the first prefix->kv_lengths[b] (kv_lengths[0] if there is one), relative
  /// to the tensor whose prefix `length_offset` belongs to others: b sees keys below kv_lengths[b] − length_offset.
  const MaskDescription* prefix = nullptr;
  std::int64_t length_offset = 0;  ///< keys that lie before these in the tensor `prefix` is about
  MaskView mask;                   ///< of this segment's keys
};

/// A call as kernels see it: segments in joined order, and which keys each row sees.
struct CallPlan {
  std::array<QuerySegment, 2> queries;      ///< the first `num_queries` count
  int num_queries = 0;                      ///< 1, or 2 with joint text
  std::array<KeySegment, 2> keys;           ///< the first `num_keys` count
  int num_keys = 0;                         ///< 1, or 2 with joint text
  std::int64_t total_rows = 0;              ///< of all query segments
  std::int64_t total_keys = 0;              ///< of all key segments
  bool causal = false;                      ///< row i sees keys j ≤ i + causal_offset
  std::int64_t causal_offset = 0;           ///< 0 for top-left, total_keys − total_rows for bottom-right
  std::shared_ptr<const KeyRanges> ranges;  ///< null: all; causality is in them where they are
};

/// One checked forward call, as `AttentionImpl::run` gets it. Valid during the call only.
struct AttentionCall {
  const Tensor& query;                ///< (B, Sq, H, D)
  const Tensor& key;                  ///< (B, Skv, Hkv, D)
  const Tensor& value;                ///< (B, Skv, Hkv, D)
  const Tensor& out;                  ///< (B, Sq, H, D); Sq counts joint tokens
  const Tensor& lse;                  ///< float32 (B, H, Sq), or null
  const AttentionMetadata& metadata;  ///< may be null; `plan` reads it

  /// Segments, masks and ranges: all that the metadata says, worked out.
  [[nodiscard]] DITATTN_API CallPlan plan(bool causal, CausalAlignment alignment) const;
};

class AttentionBackend;

/// An attention layer's implementation. Immutable: `forward` may be called by many threads at once.
class DITATTN_API AttentionImpl {
 public:
  /// Takes a config that `AttentionBackend::make` has checked.
  explicit AttentionImpl(ImplConfig config);
  virtual ~AttentionImpl();
  AttentionImpl(const AttentionImpl&) = delete;
  AttentionImpl& operator=(const AttentionImpl&) = delete;

  /// Attention: out = softmax(scale · query · keyᵀ + mask) · value, per head.
  ///
  /// query (B, Sq, H, D), key and value (B, Skv, Hkv, D) on one device and of one dtype, any strides with a unit last
  /// one (zero strides included). Everything is checked first: ValueError or NotImplementedError name what is
  /// wrong, the value and what is allowed, and nothing is written then. Rows that see no key give zeros and an LSE
  /// of −∞. Returns `outputs.out`, or a new contiguous tensor.
  Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionMetadata& metadata = {},
                 const ForwardOutputs& outputs = {}) const;

  /// What `forward` does once its arguments are checked. `call.out` never overlaps the inputs and has elements.
  virtual void run(const AttentionCall& call) const = 0;

  /// The class that built this; set by `AttentionBackend::make`.
  [[nodiscard]] const AttentionBackend& backend() const { return *backend_; }
  /// As it was built.
  [[nodiscard]] const ImplConfig& config() const { return config_; }
  /// The config's, or 1/√head_size.
  [[nodiscard]] double softmax_scale() const { return scale_; }
  /// The config's, or num_heads.
  [[nodiscard]] std::int64_t num_kv_heads() const { return config_.num_kv_heads.value_or(config_.num_heads); }

 protected:
  /// For implementations that pass calls on to others: these are counted (`launch_counts`).
  void leave_counting_to_others() { is_counted_ = false; }

 private:
  friend struct BackendAccess;
  ImplConfig config_;
  double scale_;
  std::shared_ptr<const AttentionBackend> backend_;
  bool is_counted_ = true;
  std::atomic<std::uint64_t>* launches_ = nullptr;  // null where nothing is counted
};

/// Builds implementations of one class: `AttentionBackend::make`.
using ImplFactory = std::function<std::unique_ptr<AttentionImpl>(const ImplConfig&)>;

/// A backend class: stateless, one object per class, all methods thread-safe.
class DITATTN_API AttentionBackend : public std::enable_shared_from_this<AttentionBackend> {
 public:
  virtual ~AttentionBackend();

  /// The member's name ("SDPA" for TORCH_SDPA, as in vLLM-Omni).
  [[nodiscard]] virtual std::string get_name() const = 0;
  /// The same object at every call.
  [[nodiscard]] virtual const Capabilities& capabilities() const = 0;
  /// Throws ImportError with the reason where this backend cannot run here (library or device missing).
  virtual void validate_available() const {}
  /// Yes, or each reason with its values. By default `check_capabilities`.
  [[nodiscard]] virtual Verdict explain(const Problem& problem) const;
  /// Which of an engine's kernels would compute a problem that `explain` takes, and, where it is not the fastest, why;
  /// empty where the engine does not tell. Tensors are taken for contiguous, but for `Problem::alignment`.
  [[nodiscard]] virtual std::string kernel_name(const Problem& /*problem*/) const { return {}; }

  /// Builds an implementation; checks `config` first (ValueError).
  [[nodiscard]] std::unique_ptr<AttentionImpl> make(const ImplConfig& config) const;
  /// `make` as a factory that keeps this class alive.
  [[nodiscard]] ImplFactory get_impl_cls() const;

  /// Head sizes as a list; empty means any.
  [[nodiscard]] std::vector<std::int64_t> get_supported_head_sizes() const;
  /// `capabilities().head_sizes` has it.
  [[nodiscard]] bool supports_head_size(std::int64_t head_size) const;
  /// "padding", "bool" or "additive" is among `capabilities().masks`.
  [[nodiscard]] bool supports_attention_mask() const;
  /// "spans" is among `capabilities().masks`.
  [[nodiscard]] bool supports_piecewise_spans() const;

 protected:
  /// Builds an implementation from a checked config.
  [[nodiscard]] virtual std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const = 0;
  /// Keys of `backend_kwargs` this backend knows; others are warned about, once per `make`. "*": any.
  [[nodiscard]] virtual std::vector<std::string> known_kwargs() const { return {}; }

  friend struct BackendAccess;
};

/// "The class" as look-ups return it.
using BackendClass = std::shared_ptr<const AttentionBackend>;

}  // namespace ditattn
