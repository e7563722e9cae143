#pragma once

/// What a forward call knows beside query, key and value: masks, joint text tokens, packed sequences, spans.

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/problem.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// Copies of a host array on the devices that asked for it: uploaded at the first use on each, which waits for the
/// upload, and kept. Copies of this object share them. Thread-safe.
class DITATTN_API DeviceCopies {
 public:
  /// `values` in `device`'s memory; their own on the CPU. They must be the same at every call.
  [[nodiscard]] const std::int64_t* get(const std::vector<std::int64_t>& values, DLDevice device) const;

 private:
  struct State {
    std::mutex mutex;
    std::vector<Tensor> copies;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

/// What a mask hides, worked out on the host once per `AttentionMetadata`, so that no kernel scans a mask again.
struct MaskDescription {
  /// How far a mask is known.
  enum class Kind {
    none,        ///< hides nothing
    key_prefix,  ///< batch entry b sees its first `kv_lengths[b]` keys, in every head and row
    dense,       ///< anything else: read element by element
  };
  Kind kind = Kind::none;  ///< of this mask
  /// key_prefix only: one length per batch entry of the mask (one entry stands for all).
  std::vector<std::int64_t> kv_lengths = {};
  DeviceCopies copies = {};  ///< of `kv_lengths`
};

/// Packed sequences one by one, for engines that take them so. Only rows that see keys: what sees none is in no
/// sequence, and where causality leaves a sequence's first rows without keys, it begins after them.
struct PackedSequences {
  /// Four for each sequence: its first row, its rows, its first key, its keys. Rows and keys are counted on from one
  /// batch entry to the next: entry b's row r is b · rows + r.
  std::vector<std::int64_t> numbers = {};
  std::int64_t longest_rows = 0;  ///< of one sequence
  std::int64_t longest_keys = 0;  ///< of one sequence
  std::int64_t total_rows = 0;    ///< fewer than the batch has: some see no key
  DeviceCopies copies = {};       ///< of `numbers`

  /// How many sequences.
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(numbers.size()) / 4; }
};

/// What spans and packed sequences come to: batch entry b's row r sees the keys [bounds[i], bounds[i + 1]) in joined
/// order, i = b · batch_stride + 2 · r; masks hide more.
struct KeyRanges {
  std::vector<std::int64_t> bounds;                         ///< pairs, a row after the other
  std::int64_t batch_stride = 0;                            ///< 0: one batch entry's bounds stand for all
  DeviceCopies copies = {};                                 ///< of `bounds`
  std::optional<PackedSequences> sequences = std::nullopt;  ///< none for spans
};

/// A span of full attention [begin, end), in global token coordinates.
struct Span {
  std::int64_t begin = 0;  ///< the first token in it
  std::int64_t end = 0;    ///< the first after it
};

/// Local query rows [local_start, local_end) stand at global positions from `global_start` on.
struct QueryRange {
  std::int64_t local_start = 0;   ///< the first row
  std::int64_t local_end = 0;     ///< the first after them
  std::int64_t global_start = 0;  ///< of row `local_start`
};

/// Options by name. Known keys: `cu_seqlens_q`, `cu_seqlens_k` (int32 tensors), `max_seqlen_q`, `max_seqlen_k`,
/// `valid_kv_length`, `kv_cache_dtype`. Others are ignored.
using MetadataExtra = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

/// Fields of `AttentionMetadata`, for construction: `AttentionMetadata({.attn_mask = mask})`.
///
/// All that is given holds together: a row sees a key where spans (or packing, or causality) and both masks let it.
/// Spans go before packed sequences where both are given.
struct AttentionMetadataFields {
  /// `(B, Skv)` or `(1, Skv)`: padding mask. Otherwise broadcastable to `(B, H, Sq, Skv)` by NumPy's rules, any
  /// strides. bool: true = attend. float32, float16 or bfloat16: added to the scaled logits, −∞ hides. With joint
  /// tokens it may also span the joined keys (then without `joint_attn_mask`), or the joined rows; what it does not
  /// reach is seen.
  tvm::ffi::Optional<Tensor> attn_mask = {};

  /// Text tokens, attended together with the image's: `(B, Tq, H, D)`, `(B, Tkv, Hkv, D)`. All three or none. `out`
  /// and the LSE then have Sq + Tq rows, in joined order.
  tvm::ffi::Optional<Tensor> joint_query = {};
  tvm::ffi::Optional<Tensor> joint_key = {};    ///< with `joint_query`
  tvm::ffi::Optional<Tensor> joint_value = {};  ///< with `joint_query`
  /// `(B, Tkv)`, or broadcastable to `(B, H, Sq + Tq, Tkv)`; like `attn_mask` for the text's keys.
  tvm::ffi::Optional<Tensor> joint_attn_mask = {};
  /// Text before ("front") or after ("rear") the image.
  std::string joint_strategy = "front";

  /// Per sample (one stands for all): sorted spans. Row i sees keys [0, i]; a row inside a span [a, b) sees [0, b). No
  /// value: unrestricted; an empty list: fully causal.
  std::optional<std::vector<std::vector<Span>>> full_attn_spans = std::nullopt;
  /// Where a sharded query's rows stand; empty: row i stands at i.
  std::vector<QueryRange> query_ranges = {};

  MetadataExtra extra = {};  ///< packed sequences, a valid prefix, FP8
};

/// Sizes that turn metadata into key ranges.
struct RangeRequest {
  std::int64_t batch = 0;                                     ///< entries
  std::int64_t rows = 0;                                      ///< joined
  std::int64_t keys = 0;                                      ///< joined
  bool causal = false;                                        ///< as of the layer
  CausalAlignment alignment = CausalAlignment::bottom_right;  ///< as of the back end
  /// Equal sizes have equal ranges.
  friend bool operator==(const RangeRequest&, const RangeRequest&) = default;
};

/// What an `AttentionMetadata` refers to: its fields, and what has been worked out from them.
class DITATTN_API AttentionMetadataObj : public tvm::ffi::Object {
 public:
  AttentionMetadataFields fields;  ///< as they were given; not written to after

  /// What `attn_mask` and `joint_attn_mask` hide: computed by the first call, kept. Thread-safe. The masks must not be
  /// written to after. A mask on a GPU is copied to the host for it, which waits for this thread's stream, once.
  const MaskDescription& mask_description() const;
  /// The same of `joint_attn_mask`.
  const MaskDescription& joint_mask_description() const;

  /// The ranges that spans or packed sequences come to for these sizes, causality included; null where there are
  /// neither. ValueError for what is malformed. The last answer is kept. Thread-safe.
  std::shared_ptr<const KeyRanges> key_ranges(const RangeRequest& request) const;

  /// There is joint text.
  [[nodiscard]] bool has_joint() const { return fields.joint_key.has_value(); }
  /// Text before the image.
  [[nodiscard]] bool joint_first() const { return fields.joint_strategy == "front"; }
  /// Whether `extra` describes packed sequences. ValueError if only some of its four keys are there.
  [[nodiscard]] bool is_packed() const;
  /// Whether `extra` asks for FP8 (`kv_cache_dtype`, where "auto" and nothing are the same). ValueError for what is
  /// neither.
  [[nodiscard]] bool wants_fp8_kv() const;
  /// The valid prefix of the image's keys, `keys` if all are. ValueError unless in [0, keys].
  [[nodiscard]] std::int64_t valid_kv_length(std::int64_t keys) const;

  static constexpr bool _type_mutable = true;  ///< for tvm-ffi: references reach what is not const
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.AttentionMetadata", AttentionMetadataObj, tvm::ffi::Object);

 private:
  struct Described {
    std::once_flag once;
    MaskDescription description;
  };
  mutable Described mask_;
  mutable Described joint_mask_;
  mutable std::mutex ranges_mutex_;
  mutable RangeRequest ranges_request_;
  mutable std::shared_ptr<const KeyRanges> ranges_;
};

/// A reference to immutable, shareable metadata; null means "nothing special". Build it once per model step and pass
/// it to every layer: what is worked out from a mask is then worked out once.
class DITATTN_API AttentionMetadata : public tvm::ffi::ObjectRef {
 public:
  /// Takes the fields unchecked: a forward call checks them against its tensors.
  explicit AttentionMetadata(AttentionMetadataFields fields);
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(AttentionMetadata, tvm::ffi::ObjectRef, AttentionMetadataObj);
};

}  // namespace ditattn
