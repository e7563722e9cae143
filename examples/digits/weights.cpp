#include "weights.hpp"

#include <ditattn/ditattn.hpp>
#include <fmt/format.h>

#include <charconv>
#include <string>

namespace digits {
namespace {

// Takes what it is asked for out of the file's contents; what is left in the end is superfluous.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& file) : file_(file), content_(ditattn::load_safetensors(file)) {}

  std::int64_t size(const char* name, std::int64_t max) const {
    const auto entry = content_.metadata.find(name);
    if (entry == content_.metadata.end()) fail(fmt::format("its metadata has no '{}'", name));
    const std::string& text = entry->second;
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > max) {
      fail(fmt::format("its metadata says {}='{}', expected a whole number from 1 to {}", name, text, max));
    }
    return value;
  }

  std::vector<float> tensor(const std::string& name, std::initializer_list<std::int64_t> shape) {
    const auto entry = content_.tensors.find(name);
    if (entry == content_.tensors.end()) fail(fmt::format("tensor '{}' is missing", name));
    const ditattn::Tensor tensor = entry->second;
    content_.tensors.erase(entry);
    const std::string expected = ditattn::shape_name(std::span(shape.begin(), shape.size()));
    if (ditattn::shape_name(tensor) != expected) {
      fail(fmt::format("tensor '{}' has shape {}, expected {}", name, ditattn::shape_name(tensor), expected));
    }
    if (tensor.dtype().code != kDLBfloat && tensor.dtype().code != kDLFloat) {
      fail(fmt::format("tensor '{}' is {}, expected bfloat16 or another float", name,
                       ditattn::dtype_name(tensor.dtype())));
    }
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    for (std::int64_t i = 0; float& value : values) {
      value = static_cast<float>(ditattn::load_element(tensor.data_ptr(), i++, tensor.dtype()));
    }
    return values;
  }

  Linear linear(const std::string& name, std::int64_t outputs, std::int64_t inputs) {
    return {.inputs = inputs,
            .outputs = outputs,
            .weight = tensor(name + ".weight", {outputs, inputs}),
            .bias = tensor(name + ".bias", {outputs})};
  }

  void expect_nothing_left() const {
    if (content_.tensors.empty()) return;
    fail(fmt::format("tensor '{}' is not part of this model", content_.tensors.begin()->first));
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw ditattn::FileError(fmt::format(
        "Weights '{}' are not those of a digits model: {}. train.py writes such files.", file_.string(), what));
  }

 private:
  std::filesystem::path file_;
  ditattn::SafetensorsFile content_;
};

ModelConfig read_config(const Reader& reader) {
  const ModelConfig config{.image_size = reader.size("image_size", 64),
                           .dim = reader.size("dim", 4096),
                           .heads = reader.size("heads", 4096),
                           .blocks = reader.size("blocks", 100),
                           .mlp_dim = reader.size("mlp_dim", 16384),
                           .time_dim = reader.size("time_dim", 4096),
                           .classes = reader.size("classes", 10)};
  if (config.dim % config.heads != 0) {
    reader.fail(fmt::format("dim={} is not a multiple of heads={}", config.dim, config.heads));
  }
  if (config.time_dim % 2 != 0) reader.fail(fmt::format("time_dim={} is odd", config.time_dim));
  return config;
}

}  // namespace

Weights load_weights(const std::filesystem::path& file) {
  Reader reader(file);
  const ModelConfig c = read_config(reader);
  Weights weights{.config = c,
                  .patch = reader.linear("patch", c.dim, 1),
                  .time1 = reader.linear("time1", c.dim, c.time_dim),
                  .time2 = reader.linear("time2", c.dim, c.dim),
                  .modulation = reader.linear("modulation", 6 * c.dim, c.dim),
                  .head = reader.linear("head", 1, c.dim),
                  .pos = reader.tensor("pos", {c.tokens(), c.dim}),
                  .label = reader.tensor("label", {c.classes + 1, c.dim}),
                  .blocks = {},
                  .final_table = reader.tensor("final_table", {2, c.dim})};
  for (std::int64_t block = 0; block < c.blocks; ++block) {
    const std::string prefix = fmt::format("blocks.{}.", block);
    weights.blocks.push_back({.table = reader.tensor(prefix + "table", {6, c.dim}),
                              .qkv = reader.linear(prefix + "qkv", 3 * c.dim, c.dim),
                              .out = reader.linear(prefix + "out", c.dim, c.dim),
                              .fc1 = reader.linear(prefix + "fc1", c.mlp_dim, c.dim),
                              .fc2 = reader.linear(prefix + "fc2", c.dim, c.mlp_dim)});
  }
  reader.expect_nothing_left();
  return weights;
}

}  // namespace digits
