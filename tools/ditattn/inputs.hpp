#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/metadata.hpp"

namespace ditattn::cli {

/// The tensors of one attention call.
struct Inputs {
  Tensor query;                ///< (B, Sq, H, D)
  Tensor key;                  ///< (B, Skv, Hkv, D)
  Tensor value;                ///< (B, Skv, Hkv, D)
  AttentionMetadata metadata;  ///< null without a mask
};

/// Inputs and how to call them.
struct Case {
  std::string name;
  Inputs inputs;
};

/// `query`, `key`, `value` and perhaps `attn_mask` of a safetensors file. FileError for missing tensors; joint and
/// packed ones are refused (NotImplementedError); others are warned about.
Inputs load_inputs(const std::filesystem::path& file);

/// A file as `load_inputs` takes it, or a capture: `<case>.query`, `<case>.key`, … for any number of cases. Cases are
/// named "stem" or "stem/case", in the order of their names.
std::vector<Case> load_cases(const std::filesystem::path& file);

/// Standard normal query, key and value of shape B,H,Sq,Skv,D, rounded to `dtype`; the same for the same seed.
/// MemoryError where they are larger than this machine's memory.
Inputs random_inputs(const std::vector<std::int64_t>& shape, DLDataType dtype, std::uint64_t seed);

/// The same inputs with query, key and value rounded to `dtype`.
Inputs converted(const Inputs& inputs, DLDataType dtype);

/// The configuration for a layer that takes these inputs. ValueError where they have no 4 dimensions.
ImplConfig config_for(const Inputs& inputs);

/// Checks everything that a call's tensors can have wrong for any backend (ValueError), and says what it asks for.
Problem check_inputs(const Inputs& inputs, const ImplConfig& config, const ForwardOutputs& outputs);

}  // namespace ditattn::cli
