// The tests of parallel attention on GPUs. --ranks=threads: threads that share the first; --ranks=nccl: each a GPU of
// its own, over NCCL.

#include <ditattn/cuda.hpp>
#include <ditattn/nccl.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <string_view>

#include "tests/parallel/ranks.hpp"

namespace {

namespace parallel = ditattn::parallel;

constexpr int kSkipped = 77;

// Made once for each number of ranks: that takes long.
std::map<int, std::vector<std::shared_ptr<parallel::Communicator>>>& communicators() {
  static std::map<int, std::vector<std::shared_ptr<parallel::Communicator>>> made;
  return made;
}

void run_over_nccl(int size, const parallel::testing::Body& body) {
  auto& ends = communicators()[size];
  ends.resize(static_cast<std::size_t>(size));
  parallel::run_ranks(
      size,
      [&](const std::shared_ptr<parallel::Communicator>& thread) {
        auto& mine = ends[static_cast<std::size_t>(thread->rank())];
        if (!mine) mine = parallel::nccl_communicator(thread, thread->rank());
        body(mine);
      },
      parallel::Seconds(60));
}

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const auto devices = static_cast<int>(ditattn::cuda_info().devices.size());
  const std::string_view kind = argc == 2 ? argv[1] : "";
  if (devices < (kind == "--ranks=nccl" ? 2 : 1)) {
    fmt::print("skipped: {}\n", devices == 0 ? "no CUDA device" : "one CUDA device, two are needed");
    return kSkipped;
  }
  auto& ranks = parallel::testing::ranks();
  if (kind == "--ranks=threads") {
    ranks.device = [](int) { return DLDevice{kDLCUDA, 0}; };
    ranks.sizes = {1, 2, 3, 4, 8};
    ranks.fraction = 2;
  } else if (kind == "--ranks=nccl") {
    ranks.device = [](int rank) { return DLDevice{kDLCUDA, rank}; };
    ranks.sizes = {1};
    for (int size = 2; size <= devices; ++size) ranks.sizes.push_back(size);
    ranks.run = run_over_nccl;
    ranks.fraction = 4;
  } else {
    fmt::print("Usage: parallel_gpu --ranks=threads|nccl\n");
    return 2;
  }
  const int status = RUN_ALL_TESTS();
  communicators().clear();
  return status;
}
