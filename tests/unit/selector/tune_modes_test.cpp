// What measuring leaves in files and in the process, and what DITATTN_TUNE makes of that.

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "tests/unit/selector/planted_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
using testing::kSmall;
using testing::LogRecorder;
using testing::ScopedEnvironment;

class TuneModes : public testing::PlantedTest {};

std::string contents(const std::string& file) {
  std::ostringstream text;
  text << std::ifstream(file, std::ios::binary).rdbuf();
  return text.str();
}

TEST_F(TuneModes, ResultsAreKeptAndReplaced) {
  quickly(kSmall);
  quickly(kSmall);
  const std::string file = tune_cache_file(kCpu);
  EXPECT_EQ(file.rfind(folder_.path().string() + "/tuned-", 0), 0U);
  EXPECT_EQ(read_tune_cache(file, tuned_for(kCpu), true).size(), 1U);
  reload_tuned();
  ASSERT_EQ(tuned_problems(kCpu).size(), 1U);
  EXPECT_TRUE(tuned_member(kSmall));
}

TEST_F(TuneModes, WithoutPublishingOnlyThisProcessKnows) {
  quickly(kSmall, {.publish = false});
  EXPECT_TRUE(tuned_member(kSmall));
  EXPECT_TRUE(folder_.names().empty());
  reload_tuned();
  EXPECT_FALSE(tuned_member(kSmall));
}

TEST_F(TuneModes, WhereNothingCanBeWrittenThisProcessKnowsAllTheSame) {
  std::ofstream(folder_.path() / "file") << "x";
  const ScopedEnvironment cache("DITATTN_TUNE_CACHE", (folder_.path() / "file" / "cache").c_str());
  reload_tuned();
  expect_contains(error_text<FileError>([] { quickly(kSmall); }), {"Cannot make the folder", "DITATTN_TUNE_CACHE"});
  EXPECT_TRUE(tuned_member(kSmall));
}

TEST_F(TuneModes, WithoutAFolderItWorksInMemory) {
  const ScopedEnvironment cache("DITATTN_TUNE_CACHE", nullptr);
  const ScopedEnvironment xdg("XDG_CACHE_HOME", nullptr);
  const ScopedEnvironment home("HOME", nullptr);
  reload_tuned();
  EXPECT_EQ(tune_cache_file(kCpu), "");
  quickly(kSmall);
  EXPECT_TRUE(tuned_member(kSmall));
}

TEST_F(TuneModes, WrongVariablesAreErrorsOfWhoAsks) {
  {
    const ScopedEnvironment mode("DITATTN_TUNE", "sometimes");
    reload_tuned();
    expect_contains(error_text<ValueError>([] { forward(kSmall); }), {"DITATTN_TUNE is 'sometimes'"});
    expect_contains(error_text<ValueError>([] { tune(kSmall); }), {"DITATTN_TUNE is 'sometimes'"});
    forward(kSmall, {.backend = "FLASH_ATTN"});
  }
  {
    const ScopedEnvironment cache("DITATTN_TUNE_CACHE", "here");
    reload_tuned();
    expect_contains(error_text<ValueError>([] { forward(kSmall); }), {"DITATTN_TUNE_CACHE is 'here'"});
  }
  reload_tuned();
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
}

TEST_F(TuneModes, OffUsesNothing) {
  plant(Enum::SAGE_ATTN, {});
  know(kSmall, {measured(Enum::SAGE_ATTN, 1, 1e-7)});
  EXPECT_EQ(computes(kSmall), "SAGE_ATTN");
  const ScopedEnvironment mode("DITATTN_TUNE", "off");
  reload_tuned();
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
  EXPECT_FALSE(tuned(kSmall));
  EXPECT_FALSE(tuned_member(kSmall));
  EXPECT_EQ(quickly(kSmall).results.front().backend, "SAGE_ATTN") << "asked for, it measures, and others will use that";
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
  EXPECT_EQ(explain(kSmall).chosen, Enum::FLASH_ATTN);
}

TEST_F(TuneModes, FrozenUsesTheFileAndNeverWrites) {
  plant(Enum::SAGE_ATTN, {});
  know(kSmall, {measured(Enum::SAGE_ATTN, 1, 1e-7)});
  const std::string file = tune_cache_file(kCpu);
  const std::string before = contents(file);
  const auto names = folder_.names();
  const ScopedEnvironment mode("DITATTN_TUNE", "frozen");
  reload_tuned();
  EXPECT_EQ(computes(kSmall), "SAGE_ATTN");
  EXPECT_EQ(error_text<ValueError>([] { tune(kSmall); }),
            "DITATTN_TUNE is 'frozen': nothing is measured. Unset it to tune.");
  Problem other = kSmall;
  other.seq_q = 100;
  EXPECT_EQ(computes(other), "FLASH_ATTN");
  EXPECT_EQ(contents(file), before);
  std::ofstream(file) << "damaged";
  reload_tuned();
  const LogRecorder log;
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
  EXPECT_EQ(log.of(LogLevel::warning).size(), 1U);
  EXPECT_EQ(contents(file), "damaged");
  EXPECT_EQ(folder_.names(), names);
}

TEST_F(TuneModes, ADamagedFileIsSetAsideOnceAndTuningStartsAnew) {
  quickly(kSmall);
  const std::string file = tune_cache_file(kCpu);
  std::ofstream(file) << "damaged";
  reload_tuned();
  const LogRecorder log;
  for (int call = 0; call < 3; ++call) forward(kSmall);
  EXPECT_EQ(log.of(LogLevel::warning).size(), 1U);
  EXPECT_EQ(contents(file + ".set-aside"), "damaged");
  EXPECT_FALSE(tuned(kSmall));
  quickly(kSmall);
  reload_tuned();
  EXPECT_TRUE(tuned_member(kSmall));
}

}  // namespace
}  // namespace ditattn
