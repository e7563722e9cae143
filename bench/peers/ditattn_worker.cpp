// ditattn as a worker of the comparison with other libraries (README.md has the protocol): reads commands from stdin,
// answers on stdout. A configuration is a backend and a dtype, "FLASH_ATTN-fp32".

#include <fmt/format.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>

#include "ditattn/ditattn.hpp"

namespace {

using namespace ditattn;

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

class Worker {
 public:
  void load(std::istream& arguments) {
    arguments >> path_ >> b_ >> h_ >> sq_ >> skv_ >> d_;
    config_.clear();
  }

  // Seconds per call and the number of calls.
  std::string run(std::istream& arguments) {
    std::string config;
    int threads = 0;
    double min_seconds = 0;
    arguments >> config >> threads >> min_seconds;
    set_num_threads(threads);
    if (config != config_) prepare(config);
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    std::int64_t calls = 0;
    double seconds = 0;
    do {
      call();
      ++calls;
      seconds = std::chrono::duration<double>(Clock::now() - start).count();
    } while (seconds < min_seconds);
    return fmt::format("{:.6e} {}", seconds / static_cast<double>(calls), calls);
  }

  void write_output(std::istream& arguments) const {
    std::string config;
    std::string path;
    arguments >> config >> path;
    std::ofstream stream(path, std::ios::binary);
    for (std::int64_t i = 0; i < out_.numel(); ++i) {
      const std::int64_t x = i % d_;
      const std::int64_t token = i / d_ % sq_;
      const std::int64_t head = i / d_ / sq_ % h_;
      const std::int64_t batch = i / d_ / sq_ / h_;
      const auto value =
          static_cast<float>(load_element(out_.data_ptr(), ((batch * sq_ + token) * h_ + head) * d_ + x, out_.dtype()));
      stream.write(reinterpret_cast<const char*>(&value), sizeof value);
    }
  }

 private:
  void prepare(const std::string& config) {
    const std::size_t dash = config.find('-');
    const DLDataType dtype = kDtypes.at(config.substr(dash + 1));
    std::ifstream stream(path_, std::ios::binary);
    query_ = read_tensor(stream, b_, h_, sq_, d_, dtype);
    key_ = read_tensor(stream, b_, h_, skv_, d_, dtype);
    value_ = read_tensor(stream, b_, h_, skv_, d_, dtype);
    out_ = empty({b_, sq_, h_, d_}, dtype);
    attention_ = DiffusionAttentionBackendEnum::from_name(config.substr(0, dash))
                     .get_class()
                     ->make({.num_heads = h_, .head_size = d_});
    config_ = config;
    call();
  }
  void call() { attention_->forward(query_, key_, value_, {}, {.out = out_, .lse = {}}); }

  std::string path_;
  std::string config_;
  std::int64_t b_ = 0, h_ = 0, sq_ = 0, skv_ = 0, d_ = 0;
  Tensor query_, key_, value_, out_;
  std::unique_ptr<AttentionImpl> attention_;
};

std::string configurations() {
  std::string names;
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    for (const auto& [name, dtype] : kDtypes) {
      try {
        if (member.get_class()->explain({.dtype = dtype})) names += fmt::format(" {}-{}", member.name(), name);
      } catch (const Error&) {
        break;  // unavailable here
      }
    }
  }
  return names;
}

}  // namespace

int main() {
  std::cout << "ready" << configurations() << std::endl;
  Worker worker;
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
      std::replace(text.begin(), text.end(), '\n', ' ');
      std::cout << "err " << text << std::endl;
    }
  }
}
