#pragma once

/// Attention in one call, for code that wants no classes: the back end by name, by role, or the platform's own.

#include <memory>
#include <optional>
#include <string>

#include "ditattn/attention_config.hpp"
#include "ditattn/backend.hpp"
#include "ditattn/export.hpp"

namespace ditattn {

/// Who computes, and what. Heads, sizes, dtype and device are those of the tensors.
struct AttentionOptions {
  /// A member's name in any case; "auto": the selector's choice for `role` in `config`: without one, the fastest that
  /// was measured (tuner.hpp), or else the platform's default.
  std::string backend = "auto";
  BackendClass backend_class = nullptr;                ///< not null: this class, whatever `backend` says
  std::optional<double> softmax_scale = std::nullopt;  ///< none: 1/√(head size)
  bool causal = false;  ///< row i sees keys to its diagonal, aligned as the back end's capabilities say
  /// Of "auto" by measurement, where the configuration does not say: `AttentionSpec::max_error`.
  std::optional<double> max_error = std::nullopt;
  BackendKwargs backend_kwargs = {};  ///< on top of those that `config` has for the role
  std::string role = {};              ///< "self", "cross", …; of "auto", and for observers
  std::string role_category = {};     ///< of "auto": what is asked where `config` has no entry for `role`
  AttentionConfig config = {};        ///< of "auto": who computes which role
};

/// The sizes of a layer, as `attention` reads them off the tensors.
struct LayerShape {
  std::int64_t num_heads = 1;     ///< of query
  std::int64_t num_kv_heads = 1;  ///< of key and value
  std::int64_t head_size = 1;     ///< of all three
  std::string device = "cpu";     ///< "cpu", "cuda", or one of define_platform
};

/// The layer that `attention` would use: for a new combination it is built, then kept (512; then all are built anew),
/// and after any registration chosen anew. Errors are those of `get_attn_backend_for_role` and
/// `AttentionBackend::make`; ImportError where the back end cannot run here. Thread-safe.
DITATTN_API std::shared_ptr<const AttentionImpl> attention_layer(const AttentionOptions& options,
                                                                 const LayerShape& shape);

/// out = softmax(scale · query · keyᵀ + mask) · value, per head, by `attention_layer`'s back end.
///
///     Tensor out = attention(query, key, value, {.backend = "SAGE_ATTN"});
///
/// Tensors, metadata, outputs and errors are those of `AttentionImpl::forward`. Thread-safe.
DITATTN_API Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value,
                             const AttentionOptions& options = {}, const AttentionMetadata& metadata = {},
                             const ForwardOutputs& outputs = {});

}  // namespace ditattn
