#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

#include "ditattn/threads.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::error_text;
using testing::ScopedEnvironment;
using testing::status_in_child;

class ThreadPool : public ::testing::Test {
 protected:
  void SetUp() override { set_num_threads(4); }
  void TearDown() override { set_num_threads(0); }
};

template <class Function>
void for_each_index(std::int64_t count, Function function) {
  parallel_for(
      count, [](void* context, std::int64_t index) { (*static_cast<Function*>(context))(index); }, &function);
}

// How often each index of [0, count) was done.
std::vector<int> times_done(std::int64_t count) {
  std::vector<std::atomic<int>> done(static_cast<std::size_t>(count));
  for_each_index(count, [&](std::int64_t index) { ++done[static_cast<std::size_t>(index)]; });
  return {done.begin(), done.end()};
}

TEST_F(ThreadPool, EveryIndexExactlyOnce) {
  for (int threads : {1, 2, 4, 16}) {
    set_num_threads(threads);
    for (std::int64_t count : {1, 2, 3, 64, 10000}) {
      EXPECT_EQ(times_done(count), std::vector<int>(static_cast<std::size_t>(count), 1)) << threads << " threads";
    }
  }
}

TEST_F(ThreadPool, NothingToDo) {
  for_each_index(0, [](std::int64_t) { FAIL(); });
  for_each_index(-5, [](std::int64_t) { FAIL(); });
}

// Four tasks wait for each other: they only end if four threads do them.
TEST_F(ThreadPool, TasksRunOnThatManyThreads) {
  std::atomic<int> arrived = 0;
  for_each_index(4, [&](std::int64_t) {
    ++arrived;
    while (arrived < 4) std::this_thread::yield();
  });
  EXPECT_EQ(arrived, 4);
}

TEST_F(ThreadPool, OneThreadRunsInOrderOnTheCaller) {
  set_num_threads(1);
  std::vector<std::int64_t> order;
  const std::thread::id caller = std::this_thread::get_id();
  for_each_index(5, [&](std::int64_t index) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    order.push_back(index);
  });
  EXPECT_EQ(order, (std::vector<std::int64_t>{0, 1, 2, 3, 4}));
}

TEST_F(ThreadPool, NestedCallsRunWhereTheyAre) {
  std::atomic<int> done = 0;
  for_each_index(8, [&](std::int64_t) {
    const std::thread::id outer = std::this_thread::get_id();
    for_each_index(16, [&](std::int64_t) {
      EXPECT_EQ(std::this_thread::get_id(), outer);
      ++done;
    });
  });
  EXPECT_EQ(done, 8 * 16);
}

TEST_F(ThreadPool, ManyCallersAtOnce) {
  constexpr int kCallers = 16;
  constexpr std::int64_t kCount = 500;
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c) {
    callers.emplace_back([] {
      for (int round = 0; round < 20; ++round) EXPECT_EQ(times_done(kCount), std::vector<int>(kCount, 1));
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// What tasks wrote is seen by the caller without further synchronisation.
// Idle workers do not help where as many threads as allowed are at work already.
TEST_F(ThreadPool, CallersAtOnceAreNotOversubscribed) {
  for_each_index(4, [](std::int64_t) {});  // three workers are there now
  set_num_threads(2);
  std::atomic<int> held = 0;
  std::atomic<bool> release = false;
  std::thread holder([&] {
    for_each_index(2, [&](std::int64_t) {
      ++held;
      while (!release) std::this_thread::yield();
    });
  });
  while (held < 2) std::this_thread::yield();
  std::atomic<int> elsewhere = 0;
  for (int round = 0; round < 20; ++round) {
    for_each_index(16, [&, caller = std::this_thread::get_id()](std::int64_t) {
      if (std::this_thread::get_id() != caller) ++elsewhere;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    });
  }
  EXPECT_EQ(elsewhere, 0);
  release = true;
  holder.join();
}

TEST_F(ThreadPool, ResultsAreVisibleToTheCaller) {
  std::vector<std::int64_t> squares(1000);
  for_each_index(1000, [&](std::int64_t index) { squares[static_cast<std::size_t>(index)] = index * index; });
  EXPECT_EQ(std::accumulate(squares.begin(), squares.end(), std::int64_t{0}), 332833500);
}

TEST_F(ThreadPool, SetNumThreads) {
  set_num_threads(3);
  EXPECT_EQ(num_threads(), 3);
  set_num_threads(1024);
  EXPECT_EQ(num_threads(), 1024);
}

TEST_F(ThreadPool, SetNumThreadsRefusesWhatIsOutOfRange) {
  EXPECT_EQ(error_text<ValueError>([] { set_num_threads(-1); }),
            "Number of threads -1 is out of range: 1 to 1024, or 0 for the default.");
  EXPECT_EQ(error_text<ValueError>([] { set_num_threads(1025); }),
            "Number of threads 1025 is out of range: 1 to 1024, or 0 for the default.");
  EXPECT_EQ(num_threads(), 4);  // as before
}

// The default is read once per process: each case has a child of its own.
int child_num_threads(const char* value) {
  const ScopedEnvironment variable("DITATTN_NUM_THREADS", value);
  return status_in_child([] {
    set_num_threads(0);
    return num_threads();
  });
}

TEST_F(ThreadPool, DefaultIsTheCpusOfThisProcess) {
  cpu_set_t set;
  ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
  EXPECT_EQ(child_num_threads(nullptr), CPU_COUNT(&set));
  EXPECT_EQ(child_num_threads(""), CPU_COUNT(&set));
}

TEST_F(ThreadPool, EnvironmentSetsTheDefault) {
  EXPECT_EQ(child_num_threads("3"), 3);
  const ScopedEnvironment variable("DITATTN_NUM_THREADS", "3");
  const auto chosen_wins = [] {
    set_num_threads(2);
    return num_threads();
  };
  EXPECT_EQ(status_in_child(chosen_wins), 2);
}

TEST_F(ThreadPool, BadEnvironmentIsAnErrorThatQuotesIt) {
  for (const char* bad : {"0", "-1", "1025", "two", "3x", " 3", "99999999999999999999", "2.5"}) {
    const ScopedEnvironment variable("DITATTN_NUM_THREADS", bad);
    const int status = status_in_child([&] {
      set_num_threads(0);
      const std::string expected =
          "DITATTN_NUM_THREADS='" + std::string(bad) + "' is not a whole number from 1 to 1024.";
      try {
        num_threads();
      } catch (const ValueError& error) {
        return error.message() == expected ? 0 : 2;
      }
      return 1;
    });
    EXPECT_EQ(status, 0) << "'" << bad << "': 1 means accepted, 2 another text";
  }
}

// A child has none of its parent's threads; the pool starts anew there.
TEST_F(ThreadPool, WorksAfterAFork) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer does not support threads started after a multi-threaded fork";
#endif
  EXPECT_EQ(times_done(100), std::vector<int>(100, 1));
  const auto child = [] { return times_done(1000) == std::vector<int>(1000, 1) ? 0 : 1; };
  EXPECT_EQ(status_in_child(child), 0);
  EXPECT_EQ(times_done(100), std::vector<int>(100, 1)) << "the parent's pool after the fork";
}

}  // namespace
}  // namespace ditattn
