// Files of the safetensors format: whatever the bytes are, they are refused or read, and what was read is written and
// read again as it was.

#include <ditattn/safetensors.hpp>

#include <cstring>

#include "tests/fuzz/fuzzing.hpp"

namespace {

using ditattn::SafetensorsFile;
using ditattn::Tensor;
using ditattn::fuzzing::require;

void check_equal(const Tensor& a, const Tensor& b) {
  require(a.dtype() == b.dtype() && ditattn::shape_name(a) == ditattn::shape_name(b), "dtype and shape are kept");
  const std::size_t bytes = tvm::ffi::GetDataSize(*a.GetDLTensorPtr());
  require(std::memcmp(a.data_ptr(), b.data_ptr(), bytes) == 0, "elements are kept");
}

void check_round_trip(const SafetensorsFile& content) {
  static const std::filesystem::path file = ditattn::fuzzing::scratch_file("again.safetensors");
  ditattn::save_safetensors(file, content);
  const SafetensorsFile again = ditattn::load_safetensors(file);
  require(again.metadata == content.metadata, "metadata is kept");
  require(again.tensors.size() == content.tensors.size(), "tensors are kept");
  for (const auto& [name, tensor] : content.tensors) check_equal(tensor, again.tensors.at(name));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::filesystem::path file = ditattn::fuzzing::scratch_file("read.safetensors");
  ditattn::fuzzing::write_file(file, reinterpret_cast<const char*>(data), size);
  SafetensorsFile content;
  try {
    content = ditattn::load_safetensors(file);
  } catch (const ditattn::Error&) {
    return 0;
  }
  check_round_trip(content);  // here an error of the library's is a finding too
  return 0;
}
