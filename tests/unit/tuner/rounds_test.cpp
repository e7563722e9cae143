// Rounds: who is called when, what is made of the times, and what happens to those that throw.

#include "tuner/rounds.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>

#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using std::chrono::milliseconds;

// Calls that take long enough to be timed one by one, and leave their letter.
class RoundsTest : public ::testing::Test {
 protected:
  std::size_t add(char letter, int ms) {
    return rounds_.add([this, letter, ms] {
      calls_ += letter;
      std::this_thread::sleep_for(milliseconds(ms));
    });
  }
  static void rethrow(std::size_t /*index*/) { throw; }

  Rounds rounds_{kCpu};
  std::string calls_;
};

TEST_F(RoundsTest, AreInterleavedForwardsAndBackwards) {
  const std::size_t a = add('a', 2);
  const std::size_t b = add('b', 2);
  const std::size_t c = add('c', 2);
  calls_.clear();
  std::string turns;
  rounds_.run({c, a, b}, 3, rethrow, [&](std::size_t index, int round) {
    turns += "abc"[index];
    turns += std::to_string(round);
  });
  EXPECT_EQ(calls_, "cabbaccab");
  EXPECT_EQ(turns, "c0a0b0b1a1c1c2a2b2");
  rounds_.run({b}, 2, rethrow);
  EXPECT_EQ(calls_, "cabbaccabbb");
  EXPECT_EQ(rounds_.sorted_ms(a).size(), 3U);
  EXPECT_EQ(rounds_.sorted_ms(b).size(), 5U);
}

TEST_F(RoundsTest, WarmUpIsTenCallsOrTwentyMilliseconds) {
  const auto start = std::chrono::steady_clock::now();
  add('a', 0);
  EXPECT_TRUE(calls_.size() == 10 || std::chrono::steady_clock::now() - start > milliseconds(20)) << calls_;
  calls_.clear();
  const std::size_t slow = add('b', 30);
  EXPECT_EQ(calls_.size(), 1U);
  EXPECT_GE(rounds_.call_ms(slow), 30);
  EXPECT_EQ(rounds_.median_ms(slow), rounds_.call_ms(slow)) << "without a round, the call that warmed up";
}

TEST_F(RoundsTest, AStallWhileItWarmsUpDoesNotCount) {
  int calls = 0;
  const std::size_t entry = rounds_.add([&] {
    if (++calls == 2) std::this_thread::sleep_for(milliseconds(60));
  });
  EXPECT_TRUE(rounds_.call_ms(entry) < 60 || calls == 1) << rounds_.call_ms(entry);
}

TEST_F(RoundsTest, MediansAreOfTheTimesThatWere) {
  int ms = 25;  // the one call that warms up
  const std::size_t entry = rounds_.add([&] { std::this_thread::sleep_for(milliseconds(ms)); });
  const int times[] = {60, 2, 4, 2, 90};
  rounds_.run({entry}, 5, rethrow, [&](std::size_t, int round) { ms = times[round]; });
  const std::vector<double> sorted = rounds_.sorted_ms(entry);
  ASSERT_EQ(sorted.size(), 5U);
  EXPECT_TRUE(std::ranges::is_sorted(sorted));
  EXPECT_EQ(rounds_.median_ms(entry), sorted[2]);
  EXPECT_LT(rounds_.median_ms(entry), 60) << "two slow ones of five do not show";
  EXPECT_GE(sorted[4], 90);
  rounds_.run({entry}, 1, rethrow);
  EXPECT_EQ(rounds_.median_ms(entry), (rounds_.sorted_ms(entry)[2] + rounds_.sorted_ms(entry)[3]) / 2);
}

TEST_F(RoundsTest, RatiosAreOfTheSameRound) {
  // Half of the rounds take four times as long, one of them while the first has its turn.
  int ms = 25;
  const std::size_t slow = rounds_.add([&] { std::this_thread::sleep_for(milliseconds(2 * ms)); });
  const std::size_t quick = rounds_.add([&] { std::this_thread::sleep_for(milliseconds(ms)); });
  const double unmeasured = rounds_.median_ratio(slow, quick);
  EXPECT_EQ(unmeasured, rounds_.call_ms(slow) / rounds_.call_ms(quick))
      << "without a round, of the calls that warmed up";
  const int times[] = {5, 20, 5, 20, 20};
  rounds_.run({slow, quick}, 5, rethrow,
              [&](std::size_t index, int round) { ms = index == quick && round == 3 ? 5 : times[round]; });
  std::printf("slow over quick: %.3f, medians' %.3f\n", rounds_.median_ratio(slow, quick),
              rounds_.median_ms(slow) / rounds_.median_ms(quick));
  EXPECT_NEAR(rounds_.median_ratio(slow, quick), 2, 0.4);
  EXPECT_NEAR(rounds_.median_ratio(quick, slow), 0.5, 0.1);
  EXPECT_GT(rounds_.median_ms(slow) / rounds_.median_ms(quick), 4) << "what medians alone would say";
}

TEST_F(RoundsTest, ShortCallsAreTimedSeveralAtOnce) {
  const std::size_t entry = add('a', 0);
  calls_.clear();
  rounds_.run({entry}, 1, rethrow);
  EXPECT_GT(calls_.size(), 3U);
  EXPECT_LE(calls_.size(), 1000U);
  EXPECT_LT(rounds_.median_ms(entry), 1);
}

TEST_F(RoundsTest, OneThatThrowsWhileItWarmsUpIsNoEntry) {
  EXPECT_THROW(rounds_.add([] { throw std::runtime_error("at once"); }), std::runtime_error);
  const std::size_t next = add('a', 2);
  EXPECT_EQ(next, 0U);
}

TEST_F(RoundsTest, OneThatThrowsLaterIsToldAndGetsNoFurtherTurn) {
  const std::size_t a = add('a', 2);
  int turns = 0;
  bool is_broken = false;
  const std::size_t bad = rounds_.add([&] {
    std::this_thread::sleep_for(milliseconds(25));
    if (is_broken && ++turns == 2) throw std::runtime_error("in the middle");
  });
  is_broken = true;
  calls_.clear();
  std::vector<std::string> told;
  rounds_.run({bad, a}, 4, [&](std::size_t index) {
    try {
      throw;
    } catch (const std::runtime_error& error) {
      told.push_back(std::to_string(index) + " " + error.what());
    }
  });
  EXPECT_EQ(told, std::vector<std::string>{std::to_string(bad) + " in the middle"});
  EXPECT_EQ(turns, 2);
  EXPECT_EQ(calls_, "aaaa") << "the others go on";
  EXPECT_EQ(rounds_.sorted_ms(bad).size(), 1U);
}

TEST_F(RoundsTest, AffordableIsBetweenThreeAndFifty) {
  const std::size_t quick = add('a', 0);
  const std::size_t slow = add('b', 25);
  EXPECT_EQ(rounds_.affordable({quick}, 0), 3);
  EXPECT_EQ(rounds_.affordable({slow}, 1), 3);
  EXPECT_EQ(rounds_.affordable({quick}, 20),
            std::clamp(static_cast<int>(20 / std::max(rounds_.call_ms(quick), 1.0)), 3, 20))
      << "a sample takes a millisecond at least";
  EXPECT_EQ(rounds_.affordable({quick}, 1e9), 50);
  EXPECT_EQ(rounds_.affordable({}, 10), 10);
  const int together = rounds_.affordable({quick, slow}, 260);
  EXPECT_GE(together, 3);
  EXPECT_LE(together, 10);
}

}  // namespace
}  // namespace ditattn
