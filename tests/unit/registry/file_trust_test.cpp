// Whose files may be loaded. What belongs to others takes root to make, and is skipped without.

#include "registry/file_trust.hpp"

#include <grp.h>
#include <gtest/gtest.h>
#include <pwd.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "ditattn/registry.hpp"
#include "registry/search_path.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;
using testing::expect_contains;
using testing::ScopedEnvironment;

constexpr uid_t kSomebody = 54321;  // nobody's number

class FileTrust : public testing::RegistryTest {
 protected:
  FileTrust() {
    fs::remove_all(root_);
    fs::create_directories(folder_ / "acme");
    std::ofstream(file_) << "no library";
    for (const fs::path& path : {root_, folder_, folder_ / "acme"}) fs::permissions(path, fs::perms(0755));
    fs::permissions(file_, fs::perms(0644));
    outset_ = reason_not_trusted(root_);
  }
  ~FileTrust() override { fs::remove_all(root_); }

  void SetUp() override {
    if (!outset_.empty()) GTEST_SKIP() << "the folder for temporary files is itself not trusted: " << outset_;
  }

  void expect_refused(const std::vector<std::string>& words) const {
    const std::string reason = reason_not_trusted(file_);
    EXPECT_NE(reason, "");
    for (const std::string& word : words) EXPECT_NE(reason.find(word), std::string::npos) << word << " in: " << reason;
  }

  const fs::path root_ = fs::temp_directory_path() / ("ditattn-trust-" + std::to_string(::getpid()));
  const fs::path folder_ = root_ / "plugins";
  const fs::path file_ = folder_ / "acme" / "attention.so";
  std::string outset_;
};

TEST_F(FileTrust, OwnFilesInAFolderOfTheTemporaryOne) {
  EXPECT_EQ(reason_not_trusted(file_), "");
  EXPECT_EQ(reason_not_trusted(folder_ / "." / "acme" / ".." / "acme/"), "");
}

TEST_F(FileTrust, WhatIsNotThereIsLeftToWhoeverOpensIt) {
  EXPECT_EQ(reason_not_trusted(folder_ / "nothing" / "here.so"), "");
  fs::create_symlink("loop", folder_ / "loop");
  EXPECT_EQ(reason_not_trusted(folder_ / "loop"), "");
}

TEST_F(FileTrust, NoPartMayBeOpenToEverybody) {
  for (const fs::path& path : {file_, folder_ / "acme", folder_, root_}) {
    const fs::perms before = fs::status(path).permissions();
    fs::permissions(path, before | fs::perms::others_write);
    expect_refused({"everybody may write to '" + path.string() + "' (mode 0", "chmod o-w '" + path.string() + "'"});
    fs::permissions(path, before);
    EXPECT_EQ(reason_not_trusted(file_), "");
  }
}

TEST_F(FileTrust, TheStickyBitProtectsNamesButLeavesRoomForNewOnes) {
  fs::permissions(folder_, fs::perms(01777));
  EXPECT_EQ(reason_not_trusted(file_), "");
  expect_contains(reason_not_trusted(folder_), {"everybody may write to '" + folder_.string() + "' (mode 1777"});
  expect_contains(reason_not_trusted(folder_.string() + "/./"), {"everybody may write"});
}

TEST_F(FileTrust, LinksCountByWhatTheyLeadTo) {
  const fs::path elsewhere = root_ / "elsewhere";
  fs::create_directories(elsewhere);
  fs::permissions(elsewhere, fs::perms(0755));
  fs::rename(file_, elsewhere / "real.so");
  fs::create_symlink("../../elsewhere/real.so", file_);
  EXPECT_EQ(reason_not_trusted(file_), "") << "it leaves the search directory, for a place as good";
  fs::permissions(elsewhere, fs::perms(0777));
  expect_refused({"everybody may write to '" + elsewhere.string() + "'"});
}

TEST_F(FileTrust, AGroupMayWriteIfItIsTheOwnersAlone) {
  fs::permissions(folder_, fs::perms(0775));
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give files to other groups";
  EXPECT_EQ(::chown(folder_.c_str(), 0, 0), 0);
  EXPECT_EQ(reason_not_trusted(file_), "") << "root's group is root's alone";
  ASSERT_EQ(::chown(folder_.c_str(), 0, kSomebody), 0);
  expect_refused({"a group may write to '" + folder_.string() + "' (mode 0775, user 0 (root), group 54321)",
                  "chmod g-w '" + folder_.string() + "'"});
  fs::permissions(folder_, fs::perms(0755));
  EXPECT_EQ(reason_not_trusted(file_), "");
}

// As umask 002 makes them where every user has a group of the same name.
TEST_F(FileTrust, AUserPrivateGroupMayWrite) {
  const ::passwd* user = ::getpwnam("daemon");
  const ::group* group = ::getgrnam("daemon");
  if (::geteuid() != 0 || user == nullptr || group == nullptr || group->gr_mem[0] != nullptr) {
    GTEST_SKIP() << "needs root, and a user 'daemon' alone in a group of that name";
  }
  const uid_t owner = user->pw_uid;
  for (const fs::path& path : {folder_, folder_ / "acme", file_}) {
    ASSERT_EQ(::chown(path.c_str(), owner, group->gr_gid), 0);
    fs::permissions(path, fs::perms(path == file_ ? 0664 : 0775));
  }
  ASSERT_EQ(::seteuid(owner), 0);
  const std::string reason = reason_not_trusted(file_);
  ASSERT_EQ(::seteuid(0), 0);
  EXPECT_EQ(reason, "");
}

TEST_F(FileTrust, OthersFilesFoldersAndLinksAreRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give files away";
  fs::create_symlink("acme", folder_ / "link");
  for (const fs::path& path : {file_, folder_ / "acme", folder_, root_, folder_ / "link"}) {
    ASSERT_EQ(::lchown(path.c_str(), kSomebody, 0), 0);
    const std::string reason = reason_not_trusted(folder_ / "link" / "attention.so");
    EXPECT_NE(reason.find("'" + path.string() + "' (mode "), std::string::npos) << reason;
    EXPECT_NE(reason.find("user 54321, group 0 (root)) belongs neither to root nor to user 0 (root)"),
              std::string::npos)
        << reason;
    ASSERT_EQ(::lchown(path.c_str(), 0, 0), 0);
  }
}

TEST_F(FileTrust, AnotherUserIsToldWhoItIs) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become another user";
  ASSERT_EQ(::chown(folder_.c_str(), kSomebody, kSomebody), 0);
  ASSERT_EQ(::seteuid(kSomebody + 1), 0);
  const std::string reason = reason_not_trusted(folder_);
  ASSERT_EQ(::seteuid(0), 0);
  expect_contains(reason, {"(mode 0755, user 54321, group 54321) belongs neither to root nor to user 54322"});
}

TEST_F(FileTrust, RefusedEntriesOfTheSearchPathAreIgnoredAndNamed) {
  fs::permissions(folder_, fs::perms(0777));
  const ScopedEnvironment variable("DITATTN_PLUGIN_PATH", (folder_.string() + ":" + root_.string()).c_str());
  EXPECT_EQ(plugin_search_path().back(), root_);
  ASSERT_EQ(ignored_search_path_entries().size(), 1U);
  EXPECT_EQ(ignored_search_path_entries()[0].entry, folder_);
  expect_contains(testing::error_text<ImportError>([] { return resolve_class_path("acme.attention.Backend"); }),
                  {"no such module", "DITATTN_PLUGIN_PATH entry '" + folder_.string() +
                                         "': ignored, because everybody may write to '" + folder_.string() + "'"});
}

TEST_F(FileTrust, ARefusedFileIsNotLoaded) {
  fs::permissions(file_, fs::perms(0666));
  const ScopedEnvironment variable("DITATTN_PLUGIN_PATH", folder_.c_str());
  expect_contains(testing::error_text<ImportError>([] { return resolve_class_path("acme.attention.Backend"); }),
                  {"Cannot import 'acme.attention.Backend': everybody may write to '" + file_.string() + "'"});
}

}  // namespace
}  // namespace ditattn
