// Publishing: at once, by several processes, by processes that are killed, and where nothing can be written.

#include <sys/resource.h>

#include <csignal>
#include <fstream>
#include <random>
#include <thread>

#include "tests/unit/tuner/tuner_fixture.hpp"
#include "tuner/tune_cache.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;
using testing::LogRecorder;

const TunedFor kHere{{"device", "cpu"}, {"name", "Test CPU"}};

TunedProblem numbered(std::int64_t publisher, std::int64_t index) {
  return {.problem = {.batch = publisher + 1, .seq_q = index + 1},
          .results = {{"FLASH_ATTN", "a.b.C", std::string(200, 'e'), static_cast<double>(index) + 0.5, 1e-3, ""}}};
}

class Publish : public ::testing::Test {
 protected:
  // All problems of the file; it must be whole.
  [[nodiscard]] std::vector<TunedProblem> whole() const {
    const LogRecorder log;
    auto read = read_tune_cache(file_, kHere, true);
    EXPECT_TRUE(log.entries.empty()) << log.entries[0].second;
    return read;
  }

  // Runs `count` children at once; each must end with status 0.
  template <class Body>
  static void in_children(int count, const Body& body) {
    std::vector<pid_t> children;
    for (int child = 0; child < count; ++child) {
      const pid_t pid = ::fork();
      if (pid == 0) {
        try {
          body(child);
        } catch (...) {
          ::_exit(1);
        }
        ::_exit(0);
      }
      children.push_back(pid);
    }
    for (const pid_t pid : children) {
      int status = 0;
      ::waitpid(pid, &status, 0);
      EXPECT_EQ(status, 0);
    }
  }

  testing::TemporaryFolder folder_;
  fs::path file_ = folder_.path() / "tuned.json";
};

class PublishAtOnce : public Publish, public ::testing::WithParamInterface<int> {};

TEST_P(PublishAtOnce, LeavesOneFileWithAllOfThem) {
  constexpr int each = 25;
  in_children(GetParam(), [&](int child) {
    for (int i = 0; i < each; ++i) publish_tuned(file_, kHere, {numbered(child, i)});
  });
  const std::vector<TunedProblem> read = whole();
  EXPECT_EQ(read.size(), static_cast<std::size_t>(GetParam() * each));
  for (int child = 0; child < GetParam(); ++child) {
    for (int i = 0; i < each; ++i) {
      EXPECT_EQ(std::ranges::count_if(read,
                                      [&](const TunedProblem& tuned) {
                                        return same_measurement(tuned.problem, numbered(child, i).problem) &&
                                               tuned.results.at(0).median_ms == i + 0.5;
                                      }),
                1);
    }
  }
  EXPECT_EQ(folder_.names(), (std::vector<std::string>{"tuned.json", "tuned.json.lock"}));
}
INSTANTIATE_TEST_SUITE_P(Processes, PublishAtOnce, ::testing::Values(2, 8));

TEST_F(Publish, ThreadsOfOneProcessLoseNothing) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < 20; ++i) publish_tuned(file_, kHere, {numbered(thread, i)});
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(whole().size(), 80U);
}

TEST_F(Publish, ReadersSeeTheFileAsItWasOrAsItIs) {
  publish_tuned(file_, kHere, {numbered(0, 0)});
  const pid_t writer = ::fork();
  if (writer == 0) {
    for (int i = 1; i <= 60; ++i) publish_tuned(file_, kHere, {numbered(0, i)});
    ::_exit(0);
  }
  std::size_t before = 0;
  int reads = 0;
  int status = 0;
  while (::waitpid(writer, &status, WNOHANG) == 0) {
    const std::size_t now = whole().size();
    EXPECT_GE(now, std::max<std::size_t>(before, 1));
    before = now;
    ++reads;
  }
  EXPECT_EQ(status, 0);
  EXPECT_EQ(whole().size(), 61U);
  std::cout << reads << " reads while it was written\n";
}

TEST_F(Publish, AProcessThatIsKilledLeavesAWholeFile) {
  publish_tuned(file_, kHere, {numbered(0, 0)});
  std::mt19937 random(7);
  std::size_t before = 1;
  for (int round = 0; round < 30; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (int i = 0;; ++i) publish_tuned(file_, kHere, {numbered(round + 1, i)});
    }
    std::this_thread::sleep_for(std::chrono::microseconds(500 + random() % 20'000));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "it threw instead of being killed";
    const std::size_t now = whole().size();
    EXPECT_GE(now, before);
    before = now;
  }
  publish_tuned(file_, kHere, {numbered(99, 0)});  // the lock of the killed is nobody's
  EXPECT_EQ(whole().size(), before + 1);
  std::cout << before << " problems by processes that were killed\n";
}

TEST_F(Publish, AStaleLockFileIsHarmless) {
  std::ofstream(file_.string() + ".lock") << "left by somebody";
  fs::permissions(file_.string() + ".lock", fs::perms::none);
  publish_tuned(file_, kHere, {numbered(0, 0)});
  EXPECT_EQ(whole().size(), 1U);
}

TEST_F(Publish, MakesTheFolder) {
  file_ = folder_.path() / "a" / "b" / "tuned.json";
  publish_tuned(file_, kHere, {numbered(0, 0)});
  EXPECT_EQ(whole().size(), 1U);
}

TEST_F(Publish, AFolderThatCannotBeIsAnError) {
  std::ofstream(folder_.path() / "file") << "x";
  file_ = folder_.path() / "file" / "tuned.json";
  testing::expect_contains(testing::error_text<FileError>([&] { publish_tuned(file_, kHere, {}); }),
                           {"Cannot make the folder '", "DITATTN_TUNE_CACHE names another."});
}

TEST_F(Publish, WithoutPermissionTheOldFileStays) {
  publish_tuned(file_, kHere, {numbered(0, 0)});
  fs::remove(file_.string() + ".lock");
  fs::permissions(folder_.path(), fs::perms{0555});
  const int status = testing::status_in_child([&] {
    if (::geteuid() == 0 && ::seteuid(65534) != 0) return 77;
    try {
      publish_tuned(file_, kHere, {numbered(0, 1)});
    } catch (const FileError& error) {
      return error.message().find("Cannot write tuned choices '" + file_.string() + "': Permission denied.") == 0 ? 0
                                                                                                                  : 2;
    }
    return 1;
  });
  fs::permissions(folder_.path(), fs::perms::owner_all);
  if (status == 77) GTEST_SKIP() << "privileges cannot be dropped here";
  EXPECT_EQ(status, 0);
  EXPECT_EQ(whole().size(), 1U);
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"tuned.json"});
}

// A file may not grow: to a writer that is what a full disk is.
TEST_F(Publish, WithoutRoomTheOldFileStays) {
  publish_tuned(file_, kHere, {numbered(0, 0)});
  const int status = testing::status_in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit small{.rlim_cur = 300, .rlim_max = 300};
    if (::setrlimit(RLIMIT_FSIZE, &small) != 0) return 77;
    try {
      publish_tuned(file_, kHere, {numbered(0, 1)});
    } catch (const FileError& error) {
      return error.message().find("File too large") != std::string::npos ? 0 : 2;
    }
    return 1;
  });
  EXPECT_EQ(status, 0);
  EXPECT_EQ(whole().size(), 1U);
  EXPECT_EQ(folder_.names(), (std::vector<std::string>{"tuned.json", "tuned.json.lock"}));
}

}  // namespace
}  // namespace ditattn
