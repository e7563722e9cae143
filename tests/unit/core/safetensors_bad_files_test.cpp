// The zoo of malformed safetensors files: each is a FileError that names the file and says what is wrong with it.

#include <gtest/gtest.h>

#include "ditattn/safetensors.hpp"
#include "tests/unit/core/safetensors_files.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

class BadSafetensors : public testing::SafetensorsFolder {
 protected:
  // The file as it was written last is refused, and the text has `what`.
  void expect_refused(const std::string& what) const {
    const std::string text = testing::error_text<FileError>([&] { load_safetensors(file()); });
    testing::expect_contains(text, {"Cannot read safetensors file '" + file().string() + "'", what});
  }
  void refuse(const std::string& header, const std::string& data, const std::string& what) const {
    write(header, data);
    expect_refused(what);
  }
  // A file with the one entry "t".
  void refuse_entry(const std::string& entry, const std::string& what, const std::string& data = "12345678") const {
    refuse("{\"t\":" + entry + "}", data, what);
  }
};

TEST_F(BadSafetensors, NoFile) { expect_refused("no such file"); }

TEST_F(BadSafetensors, Folder) {
  std::filesystem::create_directory(file());
  expect_refused("it is a directory");
}

TEST_F(BadSafetensors, TooShortForALength) {
  write_raw("");
  expect_refused("0 bytes are too few for a header");
  write_raw("1234567");
  expect_refused("7 bytes are too few for a header");
}

TEST_F(BadSafetensors, HeaderLengthLies) {
  write_with_length(3, "{}");
  expect_refused("header length 3 reaches past the end of the file (10 bytes)");
  write_with_length(1, "{}");  // shorter than the JSON
  expect_refused("not valid JSON");
}

TEST_F(BadSafetensors, HugeHeader) {
  write_with_length(UINT64_MAX, "{}");
  expect_refused("header length 18446744073709551615 is over the limit of 100000000 bytes");
  write_with_length(100'000'001, "{}");
  expect_refused("header length 100000001 is over the limit");
  write_with_length(100'000'000, "{}");
  expect_refused("reaches past the end of the file");
}

TEST_F(BadSafetensors, HeaderIsNotAJsonObject) {
  refuse("", "", "not valid JSON");
  refuse("not json", "", "not valid JSON");
  refuse("{\"a\":", "", "not valid JSON");
  refuse("{} trailing", "", "not valid JSON");
  refuse("{\"\xFF\":1}", "", "not valid JSON");
  refuse("[]", "", "not a JSON object");
  refuse("null", "", "not a JSON object");
  refuse("12", "", "not a JSON object");
}

TEST_F(BadSafetensors, DeeplyNestedHeader) {
  refuse(std::string(10000, '['), "", "nested too deeply");
  std::string objects;
  for (int i = 0; i < 10000; ++i) objects += "{\"a\":";
  refuse(objects, "", "nested too deeply");
}

TEST_F(BadSafetensors, DuplicateNames) {
  const std::string entry = R"("t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  refuse("{" + entry + "," + entry + "}", "1234", "name 't' occurs twice");
  refuse_entry(R"({"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]})", "name 'dtype' occurs twice");
  refuse(R"({"__metadata__":{"k":"1","k":"2"}})", "", "name 'k' occurs twice");
}

TEST_F(BadSafetensors, BadMetadata) {
  refuse(R"({"__metadata__":[]})", "", "'__metadata__' is not an object");
  refuse(R"({"__metadata__":{"k":1}})", "", "'__metadata__' entry 'k' is not a string");
}

TEST_F(BadSafetensors, EntryWithoutItsFields) {
  refuse_entry("7", "its entry is not an object");
  refuse_entry("{}", "dtype null is not one of");
  refuse_entry(R"({"dtype":"F32","data_offsets":[0,8]})", "its shape is not a list of sizes");
  refuse_entry(R"({"dtype":"F32","shape":[2]})", "its data_offsets are not two offsets");
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[8]})", "its data_offsets are not two offsets");
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4,8]})", "its data_offsets are not two offsets");
}

TEST_F(BadSafetensors, UnknownDtype) {
  refuse_entry(R"({"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]})",
               "dtype \"F8_E4M3\" is not one of F64, F32, F16, BF16, I64, I32, BOOL");
  refuse_entry(R"({"dtype":32,"shape":[2],"data_offsets":[0,8]})", "dtype 32 is not one of");
}

TEST_F(BadSafetensors, SizesThatAreNot) {
  for (const char* shape : {"[-1]", "[2.5]", "[\"2\"]", "[[2]]", "[null]", "2", "{}"}) {
    refuse_entry(R"({"dtype":"F32","shape":)" + std::string(shape) + R"(,"data_offsets":[0,8]})",
                 "its shape is not a list of sizes");
  }
}

TEST_F(BadSafetensors, ShapesThatOverflow) {
  const char* const shapes[] = {"[9223372036854775807]", "[18446744073709551615]", "[4294967296,4294967296]",
                                "[4611686018427387904,4611686018427387904,0]",
                                "[0,4611686018427387904,4611686018427387904]"};
  for (const char* shape : shapes) {
    refuse_entry(R"({"dtype":"F32","shape":)" + std::string(shape) + R"(,"data_offsets":[0,0]})", "overflows", "");
  }
}

TEST_F(BadSafetensors, OffsetsThatAreNot) {
  for (const char* offsets : {"[-8,0]", "[0,8.0]", "[\"0\",8]", "8"}) {
    refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":)" + std::string(offsets) + "}",
                 "its data_offsets are not two offsets");
  }
}

TEST_F(BadSafetensors, OffsetsOutsideTheFile) {
  refuse_entry(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})", "[0,16] lie outside the 8 bytes of data");
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[8,16]})", "lie outside");
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})", "lie outside");
  refuse_entry(R"({"dtype":"F32","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]})",
               "lie outside");
}

TEST_F(BadSafetensors, SizeThatDoesNotFitItsOffsets) {
  refuse_entry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})", "shape [1] needs 4 bytes, data_offsets give 8");
  refuse_entry(R"({"dtype":"F64","shape":[],"data_offsets":[0,4]})", "shape [] needs 8 bytes, data_offsets give 4");
}

TEST_F(BadSafetensors, OverlappingTensors) {
  refuse(
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
      "12345678", "tensor 'b' starts at byte 4 where 8 was due");
  refuse(
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
      "12345678", "hole or overlap");
}

TEST_F(BadSafetensors, Holes) {
  refuse_entry(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})", "starts at byte 4 where 0 was due");
  refuse_entry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", "4 bytes of data belong to no tensor");
  refuse("{}", "x", "1 bytes of data belong to no tensor");
}

// Every proper beginning of a good file is refused, wherever it ends.
TEST_F(BadSafetensors, TruncatedAnywhere) {
  save_safetensors(file(), {.tensors = {{"t", empty({3}, kInt32)}}, .metadata = {{"k", "v"}}});
  std::ifstream stream(file(), std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(stream)), {});
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write_raw(whole.substr(0, size));
    EXPECT_THROW(load_safetensors(file()), FileError) << "cut to " << size << " of " << whole.size() << " bytes";
  }
}

}  // namespace
}  // namespace ditattn
