// Files that are written aside: what is left where a process is ended in the middle of writing.

#include "core/atomic_file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <csignal>
#include <fstream>
#include <iterator>
#include <ostream>

#include "tests/unit/core/safetensors_files.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;

class AtomicFile : public testing::SafetensorsFolder {
 protected:
  void save(const std::string& text) const {
    write_atomically(file(), "file", [&](std::ostream& stream) { stream << text; });
  }
  [[nodiscard]] std::string text() const {
    std::ifstream stream(file(), std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  [[nodiscard]] auto files() const { return std::distance(fs::directory_iterator(folder()), {}); }
};

TEST_F(AtomicFile, AProcessThatIsEndedLeavesNoPart) {
  const int nameless = ::open(folder().c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600);
  if (nameless < 0) GTEST_SKIP() << "this file system has no files without names";
  ::close(nameless);
  save("as it was");
  for (const int signal : {SIGINT, SIGTERM, SIGKILL}) {
    const int status = testing::status_in_child([&] {
      write_atomically(file(), "file", [&](std::ostream& stream) {
        stream << std::string(100'000, 'x') << std::flush;
        ::raise(signal);
      });
      return 0;
    });
    EXPECT_EQ(status, -1) << "it ended by itself";
    EXPECT_EQ(text(), "as it was") << signal;
    EXPECT_EQ(files(), 1) << signal;
  }
}

TEST_F(AtomicFile, IsReadableAsTheMaskOfTheProcessSays) {
  const mode_t before = ::umask(027);
  save("a");
  ::umask(before);
  struct stat status {};
  ASSERT_EQ(::stat(file().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640U);
}

TEST_F(AtomicFile, WhatAnotherOfTheSameNumberLeftIsNoHindrance) {
  for (int i = 0; i < 1000; ++i) {  // whatever has been written by this process before
    std::ofstream(file().string() + "." + std::to_string(::getpid()) + "." + std::to_string(i) + ".partial") << "stale";
  }
  save("new");
  EXPECT_EQ(text(), "new");
}

// What has no name cannot be opened again by somebody whose files may not be written.
TEST_F(AtomicFile, WhereThereAreNoFilesWithoutNamesItHasOneMeanwhile) {
  fs::permissions(folder(), fs::perms::all);
  const int status = testing::status_in_child([&] {
    if (::geteuid() == 0 && ::seteuid(65534) != 0) return 77;
    ::umask(0222);
    std::ptrdiff_t meanwhile = 0;
    write_atomically(file(), "file", [&](std::ostream& stream) {
      stream << "new";
      meanwhile = files();
    });
    return static_cast<int>(meanwhile);
  });
  if (status == 77) GTEST_SKIP() << "privileges cannot be dropped here";
  EXPECT_EQ(status, 1);
  EXPECT_EQ(text(), "new");
  EXPECT_EQ(files(), 1);
}

TEST_F(AtomicFile, InTheFolderOfTheProcess) {
  const fs::path before = fs::current_path();
  fs::current_path(folder());
  write_atomically("plain", "file", [](std::ostream& stream) { stream << "x"; });
  fs::current_path(before);
  EXPECT_EQ(fs::file_size(folder() / "plain"), 1U);
  EXPECT_EQ(files(), 1);
}

}  // namespace
}  // namespace ditattn
