#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "ditattn/export.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// Tensors of a file, by name, with the file's string metadata.
struct SafetensorsFile {
  std::map<std::string, Tensor> tensors;        ///< by name; contiguous, in host memory
  std::map<std::string, std::string> metadata;  ///< the header's `__metadata__`
};

/// Reads a file of the safetensors format (8-byte little-endian header length, JSON header, data). The whole header is
/// checked before anything is allocated: FileError names the file and what is wrong with it. Dtypes: F64, F32, F16,
/// BF16, I64, I32, BOOL; others are an error only where they occur.
DITATTN_API SafetensorsFile load_safetensors(const std::filesystem::path& file);

/// Writes contiguous host tensors. The file is written aside and renamed: a failure leaves what was there before.
DITATTN_API void save_safetensors(const std::filesystem::path& file, const SafetensorsFile& content);

}  // namespace ditattn
