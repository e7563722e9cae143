// Processes with a GPU each, of which the last is lost: the others must end with a TimeoutError, soon after the
// timeout. Without an argument it kills itself in the middle, with `late` it sleeps, with `queued` it is killed when it
// has queued its calls, of which its GPU has begun none. With `failed` it says that it gives up, which the others hear
// where copy engines are used. A second argument `ulysses` has heads shared out, not keys passed round a ring.
// Usage: nccl_lost [killed|late|queued|failed] [ring|ulysses]. Exit: 0 as it should be, 1 not, 77 fewer than two GPUs.

#include <cuda_runtime.h>
#include <ditattn/cuda.hpp>
#include <ditattn/ditattn.hpp>
#include <ditattn/nccl.hpp>
#include <ditattn/parallel.hpp>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

using namespace ditattn::parallel;

constexpr int kEnded = 3;  // with the error that it should
constexpr int kSkipped = 77;
constexpr Seconds kTimeout{5};

void kill_soon(void* /*nothing*/) {
  std::this_thread::sleep_for(std::chrono::seconds(2));
  ::raise(SIGKILL);
}

void be_lost(std::string_view how, Communicator& communicator, DLDevice device) {
  if (how == "failed") return communicator.abort("of a test");
  if (how == "queued") {
    cudaSetDevice(device.device_id);
    cudaLaunchHostFunc(static_cast<cudaStream_t>(ditattn::current_stream(device)), kill_soon, nullptr);
    return;
  }
  if (how == "late") std::this_thread::sleep_for(3 * kTimeout);
  ::raise(SIGKILL);
}

int run_rank(int rank, int size, std::string_view how, bool shares_heads, const std::filesystem::path& file) try {
  const DLDevice device{kDLCUDA, rank};
  const auto communicator = nccl_communicator(file, rank, size, rank, kTimeout);
  const auto group =
      std::make_shared<ParallelGroup>(communicator, shares_heads ? Mesh{.ulysses = size} : Mesh{.ring = size});
  ParallelAttention layer(ditattn::DiffusionAttentionBackendEnum::FLASH_ATTN.get_class(),
                          {.num_heads = 8, .head_size = 64}, group);
  const ditattn::Tensor host = ditattn::empty({1, 500, 8, 64}, ditattn::kBFloat16);
  for (std::int64_t i = 0; i < host.numel(); ++i) {
    ditattn::store_element(host.data_ptr(), i, ditattn::kBFloat16, 0.01 * static_cast<double>(i % 97));
  }
  const ditattn::Tensor tokens = ditattn::copy_to(host, device);
  layer.forward(tokens, tokens, tokens);
  ditattn::synchronize(device);
  communicator->throw_if_failed();
  if (rank == size - 1) be_lost(how, *communicator, device);
  for (int call = 0; call < 3; ++call) layer.forward(tokens, tokens, tokens);
  ditattn::synchronize(device);
  communicator->throw_if_failed();
  return 0;
} catch (const ditattn::TimeoutError& error) {
  fmt::print("rank {}: {}\n", rank, error.message());
  return error.message().find("within 5 s") == std::string::npos ? 1 : kEnded;
} catch (const ditattn::CommunicationError& error) {
  fmt::print("rank {}: {}\n", rank, error.message());
  return how == "failed" && error.message().find("of a test") != std::string::npos ? kEnded : 1;
} catch (const std::exception& error) {
  fmt::print("rank {}: {}\n", rank, error.what());
  return 1;
}

// As the children see it: CUDA must not have begun before they are forked.
int count_gpus() {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(static_cast<int>(std::min<std::size_t>(ditattn::cuda_info().devices.size(), 4)));
  int status = 0;
  ::waitpid(child, &status, 0);
  return WEXITSTATUS(status);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view how = argc > 1 ? argv[1] : "killed";
  const std::string_view mesh = argc > 2 ? argv[2] : "ring";
  const int size = count_gpus();
  if (size < 2) {
    fmt::print("skipped: {} CUDA devices, two are needed\n", size);
    return kSkipped;
  }
  const auto file = std::filesystem::temp_directory_path() / fmt::format("ditattn_lost.{}", ::getpid());
  const auto start = std::chrono::steady_clock::now();
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) {
      const int status = run_rank(rank, size, how, mesh == "ulysses", file);
      std::fflush(stdout);
      ::_exit(status);
    }
    children.push_back(child);
  }
  bool as_it_should = true;
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    ::waitpid(children[static_cast<std::size_t>(rank)], &status, 0);
    const bool is_killed = rank == size - 1 && how != "failed";
    as_it_should =
        as_it_should && (is_killed ? WIFSIGNALED(status) : WIFEXITED(status) && WEXITSTATUS(status) == kEnded);
  }
  const Seconds took = std::chrono::steady_clock::now() - start;
  fmt::print("{} ranks, {}, one {}: {}, {:.1f} s\n", size, mesh, how, as_it_should ? "the others ended" : "WRONG",
             took.count());
  return as_it_should && took < kTimeout + Seconds(40) ? 0 : 1;
}
