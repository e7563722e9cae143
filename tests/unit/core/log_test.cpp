#include "ditattn/log.hpp"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

TEST(Log, DroppedWithoutAHandler) {
  set_log_handler({});
  log(LogLevel::error, "nobody listens");
}

TEST(Log, HandlerGetsLevelAndText) {
  testing::LogRecorder recorder;
  log(LogLevel::debug, "a");
  log(LogLevel::warning, std::string("b\0c", 3));
  ASSERT_EQ(recorder.entries.size(), 2U);
  EXPECT_EQ(recorder.entries[0], std::pair(LogLevel::debug, std::string("a")));
  EXPECT_EQ(recorder.entries[1], std::pair(LogLevel::warning, std::string("b\0c", 3)));
}

TEST(Log, LastHandlerReplacesTheFirst) {
  int first = 0;
  int second = 0;
  set_log_handler([&](LogLevel, std::string_view) { ++first; });
  set_log_handler([&](LogLevel, std::string_view) { ++second; });
  log(LogLevel::info, "x");
  set_log_handler({});
  log(LogLevel::info, "y");
  EXPECT_EQ(first, 0);
  EXPECT_EQ(second, 1);
}

// The counter is not atomic on purpose: ThreadSanitizer sees a handler that two threads are in.
TEST(Log, HandlerIsCalledByOneThreadAtATime) {
  constexpr int kThreads = 16;
  constexpr int kMessages = 200;
  int calls = 0;
  set_log_handler([&](LogLevel, std::string_view) { ++calls; });
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < kMessages; ++i) log(LogLevel::info, "x");
    });
  }
  for (std::thread& thread : threads) thread.join();
  set_log_handler({});
  EXPECT_EQ(calls, kThreads * kMessages);
}

}  // namespace
}  // namespace ditattn
