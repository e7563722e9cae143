// The tests of parallel attention on GPUs. --ranks=threads: threads that share the first; --ranks=nccl: processes with
// a GPU each, over NCCL.

#include <ditattn/cuda.hpp>
#include <ditattn/nccl.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <string_view>

#include "tests/parallel/ranks.hpp"

namespace {

namespace parallel = ditattn::parallel;
using parallel::testing::ranks;

constexpr int kSkipped = 77;

// Not in this process, whose children CUDA must not have begun in.
int count_gpus() {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(static_cast<int>(std::min<std::size_t>(ditattn::cuda_info().devices.size(), 8)));
  int status = 0;
  ::waitpid(child, &status, 0);
  return WEXITSTATUS(status);
}

int run_with_threads() {
  ranks().device = [](int) { return DLDevice{kDLCUDA, 0}; };
  ranks().fraction = 2;
  return RUN_ALL_TESTS();
}

int run_rank(int rank, int size, const std::filesystem::path& file) {
  const auto world = parallel::nccl_communicator(file, rank, size, rank, parallel::Seconds(60));
  ranks().device = [](int of) { return DLDevice{kDLCUDA, of}; };
  ranks().run = [&](int /*size*/, const parallel::testing::Body& body) { body(world); };
  ranks().sizes = {size};
  ranks().is_first = rank == 0;
  ranks().are_over_nccl = true;
  ranks().fraction = 2;
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) delete listeners.Release(listeners.default_result_printer());
  const int status = RUN_ALL_TESTS();
  world->barrier();
  return status;
}

int run_over_nccl(int size) {
  const auto file = std::filesystem::temp_directory_path() / fmt::format("ditattn_gpu_test.{}", ::getpid());
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) {
      const int status = run_rank(rank, size, file);
      std::fflush(stdout);
      ::_exit(status);
    }
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

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const std::string_view kind = argc == 2 ? argv[1] : "";
  if (kind != "--ranks=threads" && kind != "--ranks=nccl") {
    fmt::print("Usage: parallel_gpu --ranks=threads|nccl\n");
    return 2;
  }
  const int gpus = count_gpus();
  if (gpus < (kind == "--ranks=nccl" ? 2 : 1)) {
    fmt::print("skipped: {}\n", gpus == 0 ? "no CUDA device" : "one CUDA device, two are needed");
    return kSkipped;
  }
  return kind == "--ranks=nccl" ? run_over_nccl(gpus) : run_with_threads();
}
