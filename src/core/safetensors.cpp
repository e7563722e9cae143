#include "ditattn/safetensors.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <vector>

#include "core/atomic_file.hpp"
#include "core/json_fields.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// The reference implementation's own limit.
constexpr std::uint64_t kMaxHeader = 100'000'000;

constexpr std::pair<const char*, DLDataType> kTypes[] = {
    {"F64", kFloat64}, {"F32", kFloat32}, {"F16", kFloat16}, {"BF16", kBFloat16},
    {"I64", kInt64},   {"I32", kInt32},   {"BOOL", kBool},
};

struct Entry {
  std::string name;
  DLDataType dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t begin;
  std::uint64_t end;
};

class Reader {
 public:
  explicit Reader(const fs::path& file) : file_(file), stream_(file, std::ios::binary) {
    std::error_code error;
    if (!fs::exists(file, error)) fail("no such file");
    if (fs::is_directory(file, error)) fail("it is a directory");
    if (!stream_) fail(fmt::format("cannot be opened: {}", std::strerror(errno)));
    size_ = fs::file_size(file, error);
    if (error) fail(fmt::format("its size cannot be read: {}", error.message()));
  }

  SafetensorsFile read() {
    const json header = read_header();
    SafetensorsFile result;
    std::vector<Entry> entries;
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") {
        read_metadata(value, result);
      } else {
        entries.push_back(read_entry(name, value));
      }
    }
    check_layout(entries);
    for (const Entry& entry : entries) {
      Tensor tensor = empty(entry.shape, entry.dtype);
      stream_.seekg(static_cast<std::streamoff>(data_begin_ + entry.begin));
      stream_.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(entry.end - entry.begin));
      if (!stream_) fail(fmt::format("tensor '{}' could not be read", entry.name));
      result.tensors.emplace(entry.name, std::move(tensor));
    }
    return result;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw FileError(fmt::format("Cannot read safetensors file '{}': {}.", file_.string(), what));
  }

  json read_header() {
    unsigned char raw[8];
    if (size_ < sizeof raw) fail(fmt::format("{} bytes are too few for a header", size_));
    stream_.read(reinterpret_cast<char*>(raw), sizeof raw);
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | raw[i];
    if (length > kMaxHeader) fail(fmt::format("header length {} is over the limit of {} bytes", length, kMaxHeader));
    if (length > size_ - sizeof raw) {
      fail(fmt::format("header length {} reaches past the end of the file ({} bytes)", length, size_));
    }
    std::string text(length, '\0');
    stream_.read(text.data(), static_cast<std::streamsize>(length));
    if (!stream_) fail("the header could not be read");
    data_begin_ = sizeof raw + length;
    return parse(text);
  }

  // nlohmann keeps the last of two equal keys; a file with two is malformed. Nesting is bounded before it can hurt.
  json parse(const std::string& text) const {
    std::vector<std::set<std::string>> seen;
    const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
      if (depth > 8) fail("the header is nested too deeply");
      if (event == json::parse_event_t::object_start) seen.emplace_back();
      if (event == json::parse_event_t::object_end) seen.pop_back();
      if (event == json::parse_event_t::key && !seen.back().insert(parsed.get<std::string>()).second) {
        fail(fmt::format("name '{}' occurs twice in the header", parsed.get<std::string>()));
      }
      return true;
    };
    try {
      json header = json::parse(text, check);
      if (!header.is_object()) fail("the header is not a JSON object");
      return header;
    } catch (const json::exception& error) {
      fail(fmt::format("the header is not valid JSON: {}", error.what()));
    }
  }

  void read_metadata(const json& value, SafetensorsFile& result) const {
    if (!value.is_object()) fail("'__metadata__' is not an object");
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) fail(fmt::format("'__metadata__' entry '{}' is not a string", key));
      result.metadata.emplace(key, text.get<std::string>());
    }
  }

  Entry read_entry(const std::string& name, const json& value) const {
    const auto bad = [&](const std::string& what) { fail(fmt::format("tensor '{}': {}", name, what)); };
    const auto is_index = [](const json& number) { return number.is_number_unsigned(); };
    if (!value.is_object()) bad("its entry is not an object");
    Entry entry{.name = name, .dtype = {}, .shape = {}, .begin = 0, .end = 0};
    const json dtype = value.value("dtype", json());
    const auto* type = std::ranges::find_if(kTypes, [&](const auto& t) { return dtype == t.first; });
    if (type == std::end(kTypes))
      bad(fmt::format("dtype {} is not one of F64, F32, F16, BF16, I64, I32, BOOL", shown(dtype)));
    entry.dtype = type->second;

    const json shape = value.value("shape", json());
    if (!shape.is_array() || !std::ranges::all_of(shape, is_index)) bad("its shape is not a list of sizes");
    // The product without zeros must fit too: strides are made of it. In bits, as tvm-ffi counts.
    std::uint64_t bytes = entry.dtype.bits / 8;
    std::int64_t bits = entry.dtype.bits;
    for (const json& extent : shape) {
      const auto size = extent.get<std::uint64_t>();
      if (__builtin_mul_overflow(bits, std::max<std::uint64_t>(size, 1), &bits)) {
        bad(fmt::format("its shape {} overflows", shown(shape)));
      }
      bytes *= size;
      entry.shape.push_back(static_cast<std::int64_t>(size));
    }

    const json offsets = value.value("data_offsets", json());
    if (!offsets.is_array() || offsets.size() != 2 || !std::ranges::all_of(offsets, is_index)) {
      bad("its data_offsets are not two offsets");
    }
    entry.begin = offsets[0].get<std::uint64_t>();
    entry.end = offsets[1].get<std::uint64_t>();
    if (entry.begin > entry.end || entry.end > size_ - data_begin_) {
      bad(fmt::format("data_offsets {} lie outside the {} bytes of data", shown(offsets), size_ - data_begin_));
    }
    if (entry.end - entry.begin != bytes) {
      bad(fmt::format("shape {} needs {} bytes, data_offsets give {}", shown(shape), bytes, entry.end - entry.begin));
    }
    return entry;
  }

  // The format allows neither holes nor overlaps (so that no file can hide content).
  void check_layout(std::vector<Entry>& entries) const {
    // Empty tensors first among those that start at one byte.
    std::ranges::sort(entries, {}, [](const Entry& entry) { return std::pair(entry.begin, entry.end); });
    std::uint64_t position = 0;
    for (const Entry& entry : entries) {
      if (entry.begin != position) {
        fail(fmt::format("tensor '{}' starts at byte {} where {} was due (hole or overlap)", entry.name, entry.begin,
                         position));
      }
      position = entry.end;
    }
    if (position != size_ - data_begin_) {
      fail(fmt::format("{} bytes of data belong to no tensor", size_ - data_begin_ - position));
    }
  }

  fs::path file_;
  std::ifstream stream_;
  std::uint64_t size_ = 0;
  std::uint64_t data_begin_ = 0;
};

const char* format_name(DLDataType dtype) {
  for (const auto& [name, type] : kTypes) {
    if (type == dtype) return name;
  }
  throw ValueError("safetensors has no dtype for " + dtype_name(dtype));
}

std::string make_header(const SafetensorsFile& content) {
  json header = json::object();
  if (!content.metadata.empty()) header["__metadata__"] = content.metadata;
  std::uint64_t position = 0;
  for (const auto& [name, tensor] : content.tensors) {
    if (name == "__metadata__") throw ValueError("The tensor name '__metadata__' is reserved for the file's metadata.");
    if (!tensor.IsContiguous() || tensor.device().device_type != kDLCPU) {
      throw ValueError(fmt::format("Tensor '{}' must be contiguous and in host memory to be saved.", name));
    }
    const std::uint64_t bytes = tvm::ffi::GetDataSize(*tensor.GetDLTensorPtr());
    header[name] = {{"dtype", format_name(tensor.dtype())},
                    {"shape", std::vector<std::int64_t>(tensor.shape().begin(), tensor.shape().end())},
                    {"data_offsets", {position, position + bytes}}};
    position += bytes;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception& error) {
    throw ValueError(fmt::format("Names and metadata of a safetensors file must be UTF-8: {}.", error.what()));
  }
  text.append((8 - text.size() % 8) % 8, ' ');  // data aligned to 8 bytes, as the format recommends
  return text;
}

}  // namespace

SafetensorsFile load_safetensors(const fs::path& file) { return Reader(file).read(); }

void save_safetensors(const fs::path& file, const SafetensorsFile& content) {
  const std::string header = make_header(content);
  write_atomically(file, "safetensors file", [&](std::ostream& stream) {
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header.size() >> 8 * i);
    stream.write(reinterpret_cast<const char*>(length), sizeof length);
    stream.write(header.data(), static_cast<std::streamsize>(header.size()));
    for (const auto& [name, tensor] : content.tensors) {
      stream.write(static_cast<const char*>(data_pointer(tensor)),
                   static_cast<std::streamsize>(tvm::ffi::GetDataSize(*tensor.GetDLTensorPtr())));
    }
  });
}

}  // namespace ditattn
