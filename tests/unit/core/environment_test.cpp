#include "core/environment.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
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

// What the probe prints with every variable set to "/set".
std::string probe(const std::filesystem::path& program) {
  std::string command;
  for (const EnvironmentVariable& variable : environment_variables()) command += std::string(variable.name) + "=/set ";
  command += "'" + program.string() + "'";
  const std::unique_ptr<std::FILE, decltype(&::pclose)> pipe(::popen(command.c_str(), "r"), &::pclose);
  char line[1000] = "";
  return pipe && std::fgets(line, sizeof line, pipe.get()) != nullptr ? line : "";
}

// File capabilities set the same AT_SECURE as these two bits.
TEST(Environment, ASetUserIdOrSetGroupIdProgramReadsNoneOfIt) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can make such a program of another user";
  constexpr uid_t kSomebody = 54321;
  std::string values;
  std::string nothing;
  for (std::size_t i = 0; i < environment_variables().size(); ++i) {
    values += " /set";
    nothing += " -";
  }
  const std::filesystem::path copy =
      std::filesystem::temp_directory_path() / ("ditattn-probe-" + std::to_string(::getpid()));
  std::filesystem::copy_file(ENVIRONMENT_PROBE, copy, std::filesystem::copy_options::overwrite_existing);
  EXPECT_EQ(probe(copy), "0" + values);
  for (const mode_t mode : {04755, 02755}) {
    EXPECT_EQ(::chown(copy.c_str(), kSomebody, kSomebody), 0);
    EXPECT_EQ(::chmod(copy.c_str(), mode), 0);
    const std::string seen = probe(copy);
    if (seen.starts_with("0")) {
      std::filesystem::remove(copy);
      GTEST_SKIP() << "the folder for temporary files is mounted nosuid, or no new privileges are given here";
    }
    EXPECT_EQ(seen, "1" + nothing) << std::oct << mode;
  }
  std::filesystem::remove(copy);
}

}  // namespace
}  // namespace ditattn
