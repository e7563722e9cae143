#include "core/environment.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <linux/xattr.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>

#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::ScopedEnvironment;

TEST(Environment, TableNamesEveryVariableOnceWithAMeaning) {
  std::set<std::string> names;
  for (const EnvironmentVariable& variable : environment_variables()) {
    EXPECT_TRUE(names.insert(variable.name).second) << variable.name << " stands twice";
    EXPECT_FALSE(std::string(variable.meaning).empty()) << variable.name;
  }
  EXPECT_TRUE(names.contains("DIFFUSION_ATTENTION_BACKEND"));
  EXPECT_TRUE(names.contains("DITATTN_PLUGIN_PATH"));
  EXPECT_TRUE(names.contains("DITATTN_NUM_THREADS"));
}

TEST(Environment, ReadsTheValueOfNow) {
  const ScopedEnvironment set("DITATTN_PLUGIN_PATH", "/a:/b");
  EXPECT_EQ(environment(Env::DITATTN_PLUGIN_PATH), "/a:/b");
  const ScopedEnvironment changed("DITATTN_PLUGIN_PATH", "/c");
  EXPECT_EQ(environment(Env::DITATTN_PLUGIN_PATH), "/c");
}

TEST(Environment, UnsetAndEmptyAreNone) {
  const ScopedEnvironment unset("DIFFUSION_ATTENTION_BACKEND", nullptr);
  EXPECT_EQ(environment(Env::DIFFUSION_ATTENTION_BACKEND), std::nullopt);
  const ScopedEnvironment empty("DIFFUSION_ATTENTION_BACKEND", "");
  EXPECT_EQ(environment(Env::DIFFUSION_ATTENTION_BACKEND), std::nullopt);
}

constexpr uid_t kSomebody = 54321;

// A copy of the probe, which root can give to somebody else, or give capabilities.
class SecureEnvironment : public ::testing::Test {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "only root can make such a program";
    std::filesystem::copy_file(ENVIRONMENT_PROBE, copy_, std::filesystem::copy_options::overwrite_existing);
    std::filesystem::permissions(copy_, std::filesystem::perms{0755});
    for (std::size_t i = 0; i < environment_variables().size(); ++i) {
      values_ += " /set";
      nothing_ += " -";
    }
  }
  void TearDown() override { std::filesystem::remove(copy_); }

  // What it prints with every variable set to "/set"; `by`: the command that runs it.
  [[nodiscard]] std::string probe(const std::string& by = "") const {
    std::string command;
    for (const EnvironmentVariable& variable : environment_variables()) {
      command += std::string(variable.name) + "=/set ";
    }
    command += by + " '" + copy_.string() + "'";
    const std::unique_ptr<std::FILE, decltype(&::pclose)> pipe(::popen(command.c_str(), "r"), &::pclose);
    char line[1000] = "";
    return pipe && std::fgets(line, sizeof line, pipe.get()) != nullptr ? line : "";
  }
  // AT_SECURE and the variables: where the kernel sets it, none is read. Skips where it does not.
  void expect_nothing_read(const std::string& by = "") const {
    const std::string seen = probe(by);
    if (seen == "0" + values_) {
      GTEST_SKIP() << "the folder for temporary files is mounted nosuid, or no new privileges are given here";
    }
    EXPECT_EQ(seen, "1" + nothing_);
  }

  const std::filesystem::path copy_ =
      std::filesystem::temp_directory_path() / ("ditattn-probe-" + std::to_string(::getpid()));
  std::string values_;
  std::string nothing_;
};

TEST_F(SecureEnvironment, ASetUserIdOrSetGroupIdProgramReadsNoneOfIt) {
  EXPECT_EQ(probe(), "0" + values_);
  for (const mode_t mode : {04755, 02755}) {
    SCOPED_TRACE(mode);
    EXPECT_EQ(::chown(copy_.c_str(), kSomebody, kSomebody), 0);
    EXPECT_EQ(::chmod(copy_.c_str(), mode), 0);
    expect_nothing_read();
  }
}

// As `setcap cap_net_raw+ep` does. To root, who has them all, file capabilities give nothing.
TEST_F(SecureEnvironment, AProgramWithFileCapabilitiesReadsNoneOfIt) {
  const std::string somebody = fmt::format("setpriv --reuid={0} --regid={0} --clear-groups", kSomebody);
  if (const std::string seen = probe(somebody); seen != "0" + values_) {
    GTEST_SKIP() << "setpriv (util-linux) cannot run it as somebody else: '" << seen << "'";
  }
  vfs_cap_data capabilities{};
  capabilities.magic_etc = VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE;
  capabilities.data[0].permitted = 1U << CAP_NET_RAW;
  if (::setxattr(copy_.c_str(), XATTR_NAME_CAPS, &capabilities, XATTR_CAPS_SZ_2, 0) != 0) {
    GTEST_SKIP() << "files get no capabilities here: " << std::strerror(errno);
  }
  expect_nothing_read(somebody);
}

}  // namespace
}  // namespace ditattn
