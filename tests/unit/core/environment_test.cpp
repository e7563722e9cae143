#include "core/environment.hpp"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace ditattn
