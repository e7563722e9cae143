// Round trips and the writing of safetensors files; what is wrong in a file stands in safetensors_bad_files_test.cpp.

#include "ditattn/safetensors.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <array>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "tests/unit/core/safetensors_files.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::error_text;
using testing::expect_contains;
namespace fs = std::filesystem;

class Safetensors : public testing::SafetensorsFolder {};

// Every byte differs from its neighbours, so that a shifted read is seen.
Tensor patterned(std::span<const std::int64_t> shape, DLDataType dtype) {
  Tensor tensor = empty(shape, dtype);
  auto* bytes = static_cast<unsigned char*>(data_pointer(tensor));
  const std::size_t size = tvm::ffi::GetDataSize(*tensor.GetDLTensorPtr());
  for (std::size_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<unsigned char>(dtype == kBool ? i % 2 : (i * 7 + 3) % 251);
  }
  return tensor;
}

void expect_equal(const Tensor& a, const Tensor& b, const std::string& name) {
  ASSERT_EQ(a.dtype(), b.dtype()) << name;
  ASSERT_EQ(shape_name(a), shape_name(b)) << name;
  EXPECT_EQ(std::memcmp(data_pointer(a), data_pointer(b), tvm::ffi::GetDataSize(*a.GetDLTensorPtr())), 0) << name;
}

TEST_F(Safetensors, RoundTripOfEveryDtypeAndShape) {
  const std::vector<std::vector<std::int64_t>> shapes = {{}, {1}, {7}, {0}, {3, 0, 2}, {2, 3, 5}, {1, 2, 3, 4, 5}};
  SafetensorsFile content;
  for (DLDataType dtype : {kFloat64, kFloat32, kFloat16, kBFloat16, kInt64, kInt32, kBool}) {
    for (const auto& shape : shapes) {
      content.tensors.emplace(dtype_name(dtype) + shape_name(shape), patterned(shape, dtype));
    }
  }
  content.metadata = {{"model", "digits"}, {"quote", "\"\\\n\xC3\xA4"}, {"", ""}};
  save_safetensors(file(), content);
  const SafetensorsFile loaded = load_safetensors(file());
  EXPECT_EQ(loaded.metadata, content.metadata);
  ASSERT_EQ(loaded.tensors.size(), content.tensors.size());
  for (const auto& [name, tensor] : content.tensors) expect_equal(loaded.tensors.at(name), tensor, name);
}

TEST_F(Safetensors, RoundTripOfNothing) {
  save_safetensors(file(), {});
  const SafetensorsFile loaded = load_safetensors(file());
  EXPECT_TRUE(loaded.tensors.empty());
  EXPECT_TRUE(loaded.metadata.empty());
}

TEST_F(Safetensors, DataStartsAtAMultipleOfEight) {
  save_safetensors(file(), {.tensors = {{"a", patterned(std::array<std::int64_t, 1>{3}, kFloat64)}}, .metadata = {}});
  std::ifstream stream(file(), std::ios::binary);
  std::uint64_t length = 0;
  stream.read(reinterpret_cast<char*>(&length), sizeof length);
  EXPECT_EQ(length % 8, 0U);
}

// The reference writer sorts by dtype, then name: an empty tensor then stands at the same offset as a later name's.
TEST_F(Safetensors, EmptyTensorMayShareItsOffsetWithAnyOther) {
  write(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
        R"("z":{"dtype":"F64","shape":[0],"data_offsets":[0,0]}})",
        std::string(8, '\x01'));
  const SafetensorsFile loaded = load_safetensors(file());
  EXPECT_EQ(loaded.tensors.at("a").numel(), 2);
  EXPECT_EQ(loaded.tensors.at("z").numel(), 0);
}

TEST_F(Safetensors, ReadsTensorsInAnyOrderOfTheirData) {
  write(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},)"
        R"("b":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
        std::string("\0\0\x80?\0\0\0@", 8));
  const SafetensorsFile loaded = load_safetensors(file());
  EXPECT_EQ(load_element(data_pointer(loaded.tensors.at("b")), 0, kFloat32), 1);
  EXPECT_EQ(load_element(data_pointer(loaded.tensors.at("a")), 0, kFloat32), 2);
}

TEST_F(Safetensors, SaveRefusesWhatIsNotContiguous) {
  std::array<float, 4> data = {};
  const SafetensorsFile content{.tensors = {{"t", wrap(data.data(), {2, 2}, kFloat32, {1, 2})}}, .metadata = {}};
  EXPECT_EQ(error_text<ValueError>([&] { save_safetensors(file(), content); }),
            "Tensor 't' must be contiguous and in host memory to be saved.");
  EXPECT_TRUE(fs::is_empty(folder()));
}

TEST_F(Safetensors, SaveRefusesDtypesTheFormatLacks) {
  std::uint16_t data = 0;
  const SafetensorsFile content{.tensors = {{"t", wrap(&data, {1}, DLDataType{kDLUInt, 16, 1})}}, .metadata = {}};
  expect_contains(error_text<ValueError>([&] { save_safetensors(file(), content); }), {"safetensors has no dtype for"});
}

TEST_F(Safetensors, SaveRefusesTheReservedName) {
  const SafetensorsFile content{.tensors = {{"__metadata__", empty({1}, kFloat32)}}, .metadata = {}};
  expect_contains(error_text<ValueError>([&] { save_safetensors(file(), content); }), {"'__metadata__'", "reserved"});
}

TEST_F(Safetensors, SaveRefusesNamesThatAreNotText) {
  const SafetensorsFile content{.tensors = {{"\xFF\xFE", empty({1}, kFloat32)}}, .metadata = {}};
  expect_contains(error_text<ValueError>([&] { save_safetensors(file(), content); }), {"UTF-8"});
}

TEST_F(Safetensors, SaveWhereNothingCanBeWritten) {
  const fs::path lost = folder() / "no" / "such" / "folder.safetensors";
  expect_contains(error_text<FileError>([&] { save_safetensors(lost, {}); }),
                  {"Cannot write safetensors file", lost.string(), "No such file or directory"});
}

TEST_F(Safetensors, FailedRenameLeavesNothingBehind) {
  fs::create_directories(file() / "occupied");  // a folder of that name cannot be replaced by a file
  expect_contains(error_text<FileError>([&] { save_safetensors(file(), {}); }), {file().string()});
  EXPECT_EQ(std::distance(fs::directory_iterator(folder()), {}), 1);
  EXPECT_TRUE(fs::exists(file() / "occupied"));
}

// The disk "fills up" (a limit on file sizes, in a child process) in the middle of writing.
TEST_F(Safetensors, FailedWriteLeavesThePreviousFile) {
  const SafetensorsFile before{.tensors = {{"t", patterned(std::array<std::int64_t, 1>{16}, kInt32)}}, .metadata = {}};
  save_safetensors(file(), before);
  const int status = testing::status_in_child([&] {
    const rlimit limit{4096, 4096};
    std::signal(SIGXFSZ, SIG_IGN);
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 3;
    try {
      save_safetensors(file(), {.tensors = {{"t", empty({1 << 16}, kFloat32)}}, .metadata = {}});
    } catch (const FileError& error) {
      return error.message().find("File too large") != std::string::npos ? 0 : 2;
    }
    return 1;
  });
  EXPECT_EQ(status, 0) << "1: nothing thrown, 2: no reason given, 3: no limit could be set";
  expect_equal(load_safetensors(file()).tensors.at("t"), before.tensors.at("t"), "t");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder()), {}), 1) << "a partial file was left";
}

}  // namespace
}  // namespace ditattn
