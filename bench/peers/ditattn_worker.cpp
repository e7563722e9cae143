// ditattn as a worker of the comparison with other libraries (README.md has the protocol): reads commands from stdin,
// answers on stdout. A configuration is a member, a variant unless dense, and a dtype: "FLASH_ATTN-causal-fp32".

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>

#include "bench/variants.hpp"
#include "ditattn/ditattn.hpp"

namespace {

using namespace ditattn;
using bench::Variant;

const std::map<std::string, DLDataType> kDtypes = {{"fp32", kFloat32}, {"fp16", kFloat16}, {"bf16", kBFloat16}};

// Reads (B, H, S, D) float32 and gives a (B, S, H, D) tensor of `dtype`: the memory a model has.
Tensor read_tensor(std::istream& stream, std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d,
                   DLDataType dtype) {
  std::vector<float> values(static_cast<std::size_t>(b * h * s * d));
  stream.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  if (!stream) throw FileError("The input file is too short.");
  Tensor tensor = empty({b, s, h, d}, dtype);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    const std::int64_t x = i % d;
    const std::int64_t token = i / d % s;
    const std::int64_t head = i / d / s % h;
    const std::int64_t batch = i / d / s / h;
    store_element(tensor.data_ptr(), ((batch * s + token) * h + head) * d + x, dtype,
                  values[static_cast<std::size_t>(i)]);
  }
  return tensor;
}

struct Configuration {
  DiffusionAttentionBackendEnum member;
  Variant variant;
  std::string dtype;

  [[nodiscard]] std::string name() const {
    return variant.causal || variant.padded ? fmt::format("{}-{}-{}", member.name(), variant.name, dtype)
                                            : fmt::format("{}-{}", member.name(), dtype);
  }
};

// What can be timed on this machine, asked for a head size that all have; a shape's own may then be refused when run.
// TORCH_SDPA is left out: its native engine is written to be exact, not fast.
std::vector<Configuration> configurations() {
  std::vector<Configuration> all;
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    if (member == DiffusionAttentionBackendEnum::TORCH_SDPA) continue;
    for (const Variant& variant : bench::kVariants) {
      for (const auto& [name, dtype] : kDtypes) {
        if (can_run(member, variant, {.head_size = 64, .dtype = dtype})) all.push_back({member, variant, name});
      }
    }
  }
  return all;
}

// Everything stays until the next `load`: rounds go from one configuration to the next.
class Worker {
 public:
  [[nodiscard]] std::string ready() const {
    std::string text = "ready";
    for (const Configuration& configuration : configurations_) text += " " + configuration.name();
    return text;
  }

  void load(std::istream& arguments) {
    arguments >> path_ >> b_ >> h_ >> sq_ >> skv_ >> d_;
    layers_.clear();
    inputs_.clear();
  }

  // Seconds per call and the number of calls.
  std::string run(std::istream& arguments) {
    std::string name;
    int threads = 0;
    double min_seconds = 0;
    arguments >> name >> threads >> min_seconds;
    set_num_threads(threads);
    if (!layers_.contains(name)) prepare(name);
    const Layer& layer = layers_.at(name);
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    std::int64_t calls = 0;
    double seconds = 0;
    do {
      layer.call();
      ++calls;
      seconds = std::chrono::duration<double>(Clock::now() - start).count();
    } while (seconds < min_seconds);
    return fmt::format("{:.6e} {}", seconds / static_cast<double>(calls), calls);
  }

  void write_output(std::istream& arguments) const {
    std::string name;
    std::string path;
    arguments >> name >> path;
    const Tensor& out = layers_.at(name).out;
    std::ofstream stream(path, std::ios::binary);
    for (std::int64_t i = 0; i < out.numel(); ++i) {
      const std::int64_t x = i % d_;
      const std::int64_t token = i / d_ % sq_;
      const std::int64_t head = i / d_ / sq_ % h_;
      const std::int64_t batch = i / d_ / sq_ / h_;
      const auto value =
          static_cast<float>(load_element(out.data_ptr(), ((batch * sq_ + token) * h_ + head) * d_ + x, out.dtype()));
      stream.write(reinterpret_cast<const char*>(&value), sizeof value);
    }
  }

 private:
  struct Inputs {
    Tensor query, key, value;
  };
  struct Layer {
    Inputs inputs;
    AttentionMetadata metadata;
    Tensor out;
    std::unique_ptr<AttentionImpl> attention;

    void call() const { attention->forward(inputs.query, inputs.key, inputs.value, metadata, {.out = out, .lse = {}}); }
  };

  void prepare(const std::string& name) {
    const auto found = std::ranges::find(configurations_, name, &Configuration::name);
    if (found == configurations_.end()) throw ValueError(fmt::format("There is no configuration '{}'.", name));
    const DLDataType dtype = kDtypes.at(found->dtype);
    Layer layer{
        .inputs = inputs(found->dtype),
        .metadata = metadata_of(found->variant, b_, skv_),
        .out = empty({b_, sq_, h_, d_}, dtype),
        .attention =
            found->member.get_class()->make({.num_heads = h_, .head_size = d_, .causal = found->variant.causal}),
    };
    layer.call();
    layers_.emplace(name, std::move(layer));
  }

  const Inputs& inputs(const std::string& dtype_name) {
    auto found = inputs_.find(dtype_name);
    if (found == inputs_.end()) {
      const DLDataType dtype = kDtypes.at(dtype_name);
      std::ifstream stream(path_, std::ios::binary);
      Inputs read;  // in the file's order
      read.query = read_tensor(stream, b_, h_, sq_, d_, dtype);
      read.key = read_tensor(stream, b_, h_, skv_, d_, dtype);
      read.value = read_tensor(stream, b_, h_, skv_, d_, dtype);
      found = inputs_.emplace(dtype_name, std::move(read)).first;
    }
    return found->second;
  }

  const std::vector<Configuration> configurations_ = configurations();
  std::string path_;
  std::int64_t b_ = 0, h_ = 0, sq_ = 0, skv_ = 0, d_ = 0;
  std::map<std::string, Inputs> inputs_;  // by dtype
  std::map<std::string, Layer> layers_;   // by configuration
};

}  // namespace

int main() {
  Worker worker;
  std::cout << worker.ready() << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream arguments(line);
    std::string command;
    arguments >> command;
    try {
      std::string answer = "ok";
      if (command == "quit") break;
      if (command == "load") {
        worker.load(arguments);
      } else if (command == "run") {
        answer = worker.run(arguments);
      } else if (command == "out") {
        worker.write_output(arguments);
      } else {
        answer = "err unknown command";
      }
      std::cout << answer << std::endl;
    } catch (const std::exception& error) {
      std::string text = error.what();
      std::ranges::replace(text, '\n', ' ');
      std::cout << "err " << text << std::endl;
    }
  }
}
