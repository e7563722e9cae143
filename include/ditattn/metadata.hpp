#pragma once

/// What a forward call knows beside query, key and value: masks (and, in later versions, joint text tokens, packed
/// sequences and spans).

#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// What a mask hides, worked out on the host once per `AttentionMetadata`, so that no kernel scans a mask again.
struct MaskDescription {
  enum class Kind {
    none,        ///< hides nothing
    key_prefix,  ///< batch entry b sees its first `kv_lengths[b]` keys, in every head and row
    dense,       ///< anything else: read element by element
  };
  Kind kind = Kind::none;
  /// key_prefix only: one length per batch entry of the mask (one entry stands for all).
  std::vector<std::int64_t> kv_lengths;
};

/// Fields of `AttentionMetadata`, for construction: `AttentionMetadata({.attn_mask = mask})`.
struct AttentionMetadataFields {
  /// `(B, Skv)` or `(1, Skv)`: padding mask. Otherwise broadcastable to `(B, H, Sq, Skv)` by NumPy's rules, any
  /// strides. bool: true = attend. float32, float16 or bfloat16: added to the scaled logits, −∞ hides.
  tvm::ffi::Optional<Tensor> attn_mask;
};

class AttentionMetadataObj : public tvm::ffi::Object {
 public:
  AttentionMetadataFields fields;

  /// The mask's description: computed by the first call, kept. Thread-safe. The mask must not be written to after.
  DITATTN_API const MaskDescription& mask_description() const;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.AttentionMetadata", AttentionMetadataObj, tvm::ffi::Object);

 private:
  mutable std::once_flag described_;
  mutable MaskDescription description_;
};

/// A reference to immutable, shareable metadata; null means "nothing special". Build it once per model step and pass
/// it to every layer: what is worked out from a mask is then worked out once.
class DITATTN_API AttentionMetadata : public tvm::ffi::ObjectRef {
 public:
  explicit AttentionMetadata(AttentionMetadataFields fields);
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(AttentionMetadata, tvm::ffi::ObjectRef, AttentionMetadataObj);
};

}  // namespace ditattn
