// Attention over several GPUs beside one, a process per GPU: the link between them, and every mesh on shapes of models,
// by NCCL and by copy engines, in interleaved rounds.  Usage: ditattn_gpu_parallel [GPUs]

#include <ditattn/ditattn.hpp>
#include <ditattn/nccl.hpp>
#include <ditattn/parallel.hpp>
#include <fmt/format.h>
#include <sys/wait.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "bench/gpu/device_clock.hpp"

namespace {

using namespace ditattn::parallel;
using ditattn::Tensor;
using ditattn::bench::check;

constexpr int kRounds = 9;

struct Shape {
  const char* name;
  std::int64_t tokens, heads, head_size;
  int calls;  // in a row
};
constexpr std::array kShapes = {Shape{"flux-1024", 4608, 24, 128, 50}, Shape{"wan1.3b-480p", 32760, 12, 128, 5},
                                Shape{"wan14b-720p", 75600, 40, 128, 1}};

struct Transport {
  std::string name;
  std::shared_ptr<Communicator> communicator;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

class Rank {
 public:
  Rank(int rank, std::vector<Transport> transports)
      : device_{kDLCUDA, rank}, transports_(std::move(transports)), communicator_(transports_.front().communicator) {
    check(cudaSetDevice(rank), "cudaSetDevice");
    clock_ = std::make_unique<ditattn::bench::Clock>();
    TVMFFIEnvSetStream(device_.device_type, device_.device_id, clock_->stream(), nullptr);
  }

  void measure_link() {
    say("link: bytes to the next rank and from the one before at the same time, a stream's time per exchange\n");
    const int size = communicator_->size();
    const int rank = communicator_->rank();
    for (const std::int64_t bytes : {std::int64_t{1} << 10, std::int64_t{1} << 20, std::int64_t{8} << 20,
                                     std::int64_t{64} << 20, std::int64_t{512} << 20}) {
      const Tensor sent = ditattn::empty(std::array{bytes}, ditattn::kBool, device_);
      for (const auto& [name, communicator] : transports_) {
        const Tensor received = communicator->receive_memory(bytes, device_);
        const auto exchange = [&, &from = communicator] {
          from->exchange({.rank = (rank + 1) % size, .data = sent.data_ptr(), .bytes = bytes},
                         {.rank = (rank + size - 1) % size, .data = received.data_ptr(), .bytes = bytes}, device_)
              ->wait();
        };
        const double ms = time(exchange, 20);
        say(fmt::format("  {:<12} {:>9} KiB {:8.4f} ms {:7.1f} GB/s per direction\n", name, bytes >> 10, ms,
                        static_cast<double>(bytes) / ms / 1e6));
      }
    }
  }

  void measure(const Shape& shape) {
    const auto backend = ditattn::DiffusionAttentionBackendEnum::FLASH_ATTN.get_class();
    const ditattn::ImplConfig config{.num_heads = shape.heads, .head_size = shape.head_size};
    std::array<Tensor, 3> whole;
    for (std::size_t i = 0; i < whole.size(); ++i)
      whole[i] = random({1, shape.tokens, shape.heads, shape.head_size}, i);
    const auto lengths = balanced_lengths(shape.tokens, communicator_->size());
    std::int64_t first = 0;
    for (int rank = 0; rank < communicator_->rank(); ++rank) first += lengths[static_cast<std::size_t>(rank)];
    const std::int64_t mine = lengths[static_cast<std::size_t>(communicator_->rank())];
    const auto part = [&](const Tensor& tensor) {
      const std::int64_t row = shape.heads * shape.head_size;
      return ditattn::wrap(static_cast<char*>(tensor.data_ptr()) + 2 * first * row,
                           {1, mine, shape.heads, shape.head_size}, tensor.dtype(), {}, device_);
    };
    const auto alone = backend->make(config);
    const Tensor expected = ditattn::empty(std::array{std::int64_t{1}, shape.tokens, shape.heads, shape.head_size},
                                           ditattn::kBFloat16, device_);
    struct Way {
      std::string mesh;
      std::string transport;
      std::function<void()> call;
      std::vector<double> times;
      double error = 0;
    };
    std::vector<Way> ways;
    ways.push_back({.mesh = "",
                    .transport = "",
                    .call = [&] { alone->forward(whole[0], whole[1], whole[2], {}, {.out = expected}); },
                    .times = {}});
    ways[0].call();
    std::vector<std::unique_ptr<ParallelAttention>> layers;
    const std::array<Tensor, 3> parts = {part(whole[0]), part(whole[1]), part(whole[2])};
    const Tensor out =
        ditattn::empty(std::array{std::int64_t{1}, mine, shape.heads, shape.head_size}, ditattn::kBFloat16, device_);
    for (const Mesh& mesh : meshes_of(communicator_->size())) {
      for (const auto& [name, communicator] : transports_) {
        layers.push_back(
            std::make_unique<ParallelAttention>(backend, config, std::make_shared<ParallelGroup>(communicator, mesh)));
        ParallelAttention& layer = *layers.back();
        ways.push_back(
            {.mesh = mesh_name(mesh),
             .transport = name,
             .call = [&layer, &parts, out] { layer.forward(parts[0], parts[1], parts[2], {}, {.out = out}); },
             .times = {}});
        ways.back().call();
        ways.back().error = difference(out, part(expected));
      }
    }
    for (int round = 0; round < kRounds; ++round) {
      for (Way& way : ways) way.times.push_back(time(way.call, shape.calls));
    }
    const double alone_ms = median(ways[0].times);
    say(fmt::format("{}: {} tokens, {} heads of {}, bfloat16, FLASH_ATTN\n", shape.name, shape.tokens, shape.heads,
                    shape.head_size));
    for (const Way& way : ways) {
      const double ms = median(way.times);
      const bool is_alone = way.mesh.empty();
      const std::string name = is_alone ? "1 GPU" : fmt::format("{}, {}", way.mesh, way.transport);
      say(fmt::format("  {:<32} {:8.3f} ms  {:5.2f} times 1 GPU  (from {:.3f} to {:.3f}; error {:.1e})\n", name, ms,
                      alone_ms / ms, *std::ranges::min_element(way.times), *std::ranges::max_element(way.times),
                      way.error));
      say(
          fmt::format("  {{\"gpus\":{},\"mesh\":\"{}\",\"transport\":\"{}\",\"tokens\":{},\"heads\":{},"
                      "\"head_size\":{},\"ms\":{:.4f}}}\n",
                      is_alone ? 1 : communicator_->size(), way.mesh, way.transport, shape.tokens, shape.heads,
                      shape.head_size, ms));
    }
    for (const auto& [name, communicator] : transports_) communicator->throw_if_failed();
  }

 private:
  void say(const std::string& text) const {
    if (communicator_->rank() == 0) fmt::print("{}", text);
    std::fflush(stdout);
  }

  // Milliseconds per call, all ranks beginning together.
  double time(const std::function<void()>& call, int calls) const {
    call();
    ditattn::synchronize(device_);
    communicator_->barrier();
    return clock_->milliseconds([&] {
      for (int i = 0; i < calls; ++i) call();
    }) / static_cast<float>(calls);
  }

  // The same on every rank: a block of numbers, over and over.
  [[nodiscard]] Tensor random(std::initializer_list<std::int64_t> shape, std::uint64_t seed) const {
    constexpr std::int64_t block_size = 1 << 18;
    const Tensor block = ditattn::empty({block_size}, ditattn::kBFloat16);
    std::uint64_t state = 0x9E3779B97F4A7C15U + seed;
    for (std::int64_t i = 0; i < block_size; ++i) {
      double sum = -6;  // of twelve uniform numbers
      for (int j = 0; j < 12; ++j) {
        state = state * 6364136223846793005U + 1442695040888963407U;
        sum += static_cast<double>(state >> 11U) / 9007199254740992.0;
      }
      ditattn::store_element(block.data_ptr(), i, ditattn::kBFloat16, sum);
    }
    Tensor tensor = ditattn::empty(std::vector(shape), ditattn::kBFloat16, device_);
    for (std::int64_t at = 0; at < tensor.numel(); at += block_size - 31) {  // no row stands twice
      const auto bytes = static_cast<std::size_t>(2 * std::min(block_size - 31, tensor.numel() - at));
      check(cudaMemcpy(static_cast<char*>(tensor.data_ptr()) + 2 * at,
                       static_cast<char*>(block.data_ptr()) + at % 31 * 2, bytes, cudaMemcpyHostToDevice),
            "cudaMemcpy");
    }
    return tensor;
  }

  // ‖a − b‖ / ‖b‖ over some rows.
  [[nodiscard]] double difference(const Tensor& a, const Tensor& b) const {
    ditattn::synchronize(device_);
    const std::int64_t count = std::min<std::int64_t>(a.numel(), 1 << 20);
    std::vector<std::uint16_t> left(static_cast<std::size_t>(count)), right(left.size());
    check(cudaMemcpy(left.data(), a.data_ptr(), 2 * left.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    check(cudaMemcpy(right.data(), b.data_ptr(), 2 * left.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    double apart = 0;
    double norm = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const double y = ditattn::load_element(right.data(), i, ditattn::kBFloat16);
      apart += std::pow(ditattn::load_element(left.data(), i, ditattn::kBFloat16) - y, 2);
      norm += y * y;
    }
    return std::sqrt(apart / norm);
  }

  DLDevice device_;
  std::vector<Transport> transports_;
  std::shared_ptr<Communicator> communicator_;  // the first
  std::unique_ptr<ditattn::bench::Clock> clock_;
};

// Copy engines where they can.
std::vector<Transport> transports_of(int rank, int gpus, const std::filesystem::path& file) {
  ::setenv("DITATTN_PEER_COPIES", "off", 1);
  std::vector<Transport> made = {{"NCCL", nccl_communicator(file, rank, gpus, rank, Seconds(60))}};
  ::setenv("DITATTN_PEER_COPIES", "on", 1);
  try {
    made.push_back({"copy engines", nccl_communicator(made.front().communicator, rank)});
  } catch (const ditattn::NotImplementedError& error) {
    if (rank == 0) fmt::print("no copy engines: {}\n", error.message());
  }
  return made;
}

int run_rank(int rank, int gpus, const std::filesystem::path& file) try {
  Rank mine(rank, transports_of(rank, gpus, file));
  mine.measure_link();
  for (const Shape& shape : kShapes) mine.measure(shape);
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "rank {}: {}\n", rank, error.what());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  int gpus = 2;
  const std::string_view text = argc > 1 ? argv[1] : "2";
  if (std::from_chars(text.data(), text.data() + text.size(), gpus).ptr != text.data() + text.size() || gpus < 2) {
    fmt::print(stderr, "Usage: ditattn_gpu_parallel [GPUs, 2 or more]\n");
    return 2;
  }
  const auto file = std::filesystem::temp_directory_path() / fmt::format("ditattn_ranks.{}", ::getpid());
  std::vector<pid_t> children;  // before anything of CUDA
  for (int rank = 0; rank < gpus; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(run_rank(rank, gpus, file));
    children.push_back(child);
  }
  int worst = 0;
  for (const pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    worst = std::max(worst, WIFEXITED(status) ? WEXITSTATUS(status) : 1);
  }
  return worst;
}
