// DITATTN_TUNE and DITATTN_TUNE_CACHE: what they may be, and where files go.

#include "tuner/tune_mode.hpp"

#include <fstream>

#include "ditattn/threads.hpp"
#include "tests/unit/tuner/tuner_fixture.hpp"
#include "tuner/tuned_for.hpp"

namespace ditattn {
namespace {

using testing::error_text;
using testing::ScopedEnvironment;

TEST(TuneMode, AnyCaseAndUnset) {
  for (const auto& [text, mode] : {std::pair{"use", TuneMode::use},
                                   {"OFF", TuneMode::off},
                                   {"Frozen", TuneMode::frozen},
                                   {"online", TuneMode::online},
                                   {"", TuneMode::use},
                                   {static_cast<const char*>(nullptr), TuneMode::use}}) {
    const ScopedEnvironment variable("DITATTN_TUNE", text);
    EXPECT_EQ(tune_mode(), mode) << (text == nullptr ? "unset" : text);
  }
}

TEST(TuneMode, AnythingElseIsAnErrorThatNamesIt) {
  for (const char* wrong : {"yes", "1", "use ", "onlines"}) {
    const ScopedEnvironment variable("DITATTN_TUNE", wrong);
    EXPECT_EQ(error_text<ValueError>([] { tune_mode(); }),
              "DITATTN_TUNE is '" + std::string(wrong) + "'. Valid modes are: use, off, frozen, online");
  }
}

TEST(TuneCacheFolder, IsTheFirstThatIsSet) {
  const ScopedEnvironment home("HOME", "/home/somebody");
  const ScopedEnvironment xdg("XDG_CACHE_HOME", "/xdg");
  {
    const ScopedEnvironment own("DITATTN_TUNE_CACHE", "/own");
    EXPECT_EQ(tune_cache_folder(), "/own");
  }
  const ScopedEnvironment own("DITATTN_TUNE_CACHE", nullptr);
  EXPECT_EQ(tune_cache_folder(), "/xdg/ditattn");
  for (const char* unusable : {static_cast<const char*>(nullptr), "", "relative"}) {
    const ScopedEnvironment none("XDG_CACHE_HOME", unusable);
    EXPECT_EQ(tune_cache_folder(), "/home/somebody/.cache/ditattn");
    const ScopedEnvironment no_home("HOME", unusable);
    EXPECT_EQ(tune_cache_folder(), "");
  }
}

TEST(TuneCacheFolder, ARelativeOneIsAnErrorThatNamesIt) {
  for (const char* wrong : {"cache", "./cache", "~/cache"}) {
    const ScopedEnvironment variable("DITATTN_TUNE_CACHE", wrong);
    EXPECT_EQ(error_text<ValueError>([] { tune_cache_folder(); }),
              "DITATTN_TUNE_CACHE is '" + std::string(wrong) + "', expected an absolute directory.");
  }
}

TEST(TunedFor, EachThingThatMattersMakesAnotherFile) {
  const TunedFor here = tuned_for(kCpu);
  const std::string name = file_name(here);
  EXPECT_EQ(name.rfind("tuned-", 0), 0U) << name;
  EXPECT_EQ(file_name(tuned_for(kCpu)), name);
  for (const auto& [key, value] : here) {
    TunedFor other = here;
    other[key] += "x";
    EXPECT_NE(file_name(other), name) << key;
  }
  TunedFor moved = here;  // the same letters, divided otherwise
  moved["name"] = here.at("name") + here.at("threads");
  moved["threads"] = "";
  EXPECT_NE(file_name(moved), name);
  TunedFor odd = here;
  odd["name"] = "../..//A CPU\n(R) @ 3 GHz";
  EXPECT_EQ(file_name(odd).find_first_of("/\n ()@"), std::string::npos) << file_name(odd);
  error_text<ImportError>([] { tuned_for({kDLCUDA, 99}); });
}

using TunedThreads = testing::TunerTest;

// Times with two threads say nothing about one.
TEST_F(TunedThreads, OfAnotherNumberOfThreadsNothingIsKnown) {
  set_num_threads(2);
  const std::string two = tune_cache_file(kCpu);
  know({.seq_q = 9}, {});
  EXPECT_EQ(tuned_problems(kCpu).size(), 1U);
  set_num_threads(1);
  EXPECT_NE(tune_cache_file(kCpu), two);
  EXPECT_TRUE(tuned_problems(kCpu).empty());
  set_num_threads(2);
  EXPECT_EQ(tuned_problems(kCpu).size(), 1U);
  set_num_threads(0);
}

}  // namespace
}  // namespace ditattn
