// Threads that compute by default while another tunes, and registrations and files change.

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/unit/selector/planted_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::kSmall;

class TuneThreads : public testing::PlantedTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(TuneThreads, ManyComputeWhileEverythingChanges) {
  const testing::ScopedEnvironment mode("DITATTN_TUNE", GetParam());
  reload_tuned();
  plant(Enum::FLASH_ATTN, {});
  plant(Enum::TORCH_SDPA, {});
  plant(Enum::SAGE_ATTN, {});
  std::atomic<bool> is_done = false;
  std::atomic<int> calls = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&, thread] {
      const auto kept = get_attn_backend_for_role("self", 16).backend->make({.num_heads = 2, .head_size = 16});
      NormalTensors normal(1, kFloat32);
      const Tensor x = normal.next({1, 4 + thread % 3, 2, 16});
      while (!is_done) {
        Problem problem = kSmall;
        problem.seq_q = 8 + calls % 9;
        forward(problem);
        kept->forward(x, x, x);
        explain(problem);
        tuned_member(problem);
        ++calls;
      }
    });
  }
  for (int round = 0; round < 12; ++round) {
    Problem problem = kSmall;
    problem.seq_q = 8 + round % 4;
    tune(problem, {.budget_ms = 1, .publish = round % 3 == 0});
    use(Enum::SAGE_ATTN, std::make_shared<testing::PlantedBackend>("SAGE_ATTN", testing::Plant{}));
    if (round % 4 == 0) reload_tuned();
    Enum::CUSTOM.clear_override();
  }
  is_done = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(calls, 0);
  std::cout << calls << " rounds of calls by 8 threads\n";
}
INSTANTIATE_TEST_SUITE_P(Modes, TuneThreads, ::testing::Values("use", "online"));

}  // namespace
}  // namespace ditattn
