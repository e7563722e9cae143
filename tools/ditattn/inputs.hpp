#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/metadata.hpp"
#include "tools/ditattn/place.hpp"

namespace ditattn::cli {

/// The tensors of one attention call.
struct Inputs {
  Tensor query;                                        ///< (B, Sq, H, D)
  Tensor key;                                          ///< (B, Skv, Hkv, D)
  Tensor value;                                        ///< (B, Skv, Hkv, D)
  AttentionMetadata metadata;                          ///< null where the call has nothing else
  std::optional<double> softmax_scale = std::nullopt;  ///< none: 1/√D
  bool causal = false;
};

/// Inputs and how to call them.
struct Case {
  std::string name;
  Inputs inputs;
  std::optional<Place> place = std::nullopt;  ///< of a capture's cases
};

/// What a call knows beside the tensors of its file.
struct CallOptions {
  std::optional<std::string> joint_strategy = std::nullopt;    ///< none: the file's, or else "front"
  std::optional<std::int64_t> valid_kv_length = std::nullopt;  ///< none: the file's, or else all keys
};

/// `query`, `key`, `value` of a safetensors file, and what it has of `attn_mask`, `joint_query`, `joint_key`,
/// `joint_value`, `joint_attn_mask`, `cu_seqlens_q`, `cu_seqlens_k`, `max_seqlen_q` and `max_seqlen_k` (without the
/// last two: the longest sequence). The file's metadata may say how the call was made (docs/capture.md lists the keys).
/// FileError for missing tensors and malformed metadata; unknown tensors are warned about, unknown keys are not read.
Inputs load_inputs(const std::filesystem::path& file, const CallOptions& options);

/// A file as `load_inputs` takes it, or a capture: `<case>.query`, `<case>.key`, … for any number of cases, keys of the
/// metadata likewise. Cases are named "stem" or "stem/case", in the order of their names. A capture's have a place:
/// from the texts `layer` and `timestep`, or else from names like "step000005/blocks.0.attn" and "blocks.0 t=0.95".
std::vector<Case> load_cases(const std::filesystem::path& file, const CallOptions& options);

/// Standard normal query, key and value of shape B,H,Sq,Skv,D, rounded to `dtype`; the same for the same seed.
/// MemoryError where they are larger than this machine's memory.
Inputs random_inputs(const std::vector<std::int64_t>& shape, DLDataType dtype, std::uint64_t seed);

/// The same inputs with query, key and value, joint ones too, rounded to `dtype`.
Inputs converted(const Inputs& inputs, DLDataType dtype);

/// The same inputs in the memory of `device`.
Inputs inputs_on(const Inputs& inputs, DLDevice device);

/// The configuration for a layer that takes these inputs, scale and causality included. ValueError where they have no 4
/// dimensions.
ImplConfig config_for(const Inputs& inputs);

/// Checks everything that a call's tensors can have wrong for any backend (ValueError), and says what it asks for: its
/// `seq_q` rows, joint tokens included, are those of the output.
Problem check_inputs(const Inputs& inputs, const ImplConfig& config);

/// A tensor for the output: (B, Sq, H, D) of the problem, in its dtype, on its device.
Tensor allocate_out(const Problem& problem);

}  // namespace ditattn::cli
