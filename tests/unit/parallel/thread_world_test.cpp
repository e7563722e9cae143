// Operations between threads, and what becomes of ranks that fail, come late, or call something else.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "ditattn/communicator.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn::parallel {
namespace {

using Clock = std::chrono::steady_clock;
using ditattn::testing::error_text;
using ditattn::testing::expect_contains;
using Ends = std::shared_ptr<Communicator>;

// Rank `from` gives `to` this many bytes, all of this value.
std::int64_t count(int from, int to) { return (from * 3 + to * 5) % 4; }
char value(int from, int to) { return static_cast<char>(1 + 10 * from + to); }

class Sizes : public ::testing::TestWithParam<int> {};

TEST_P(Sizes, AllToAllOfUnevenCounts) {
  run_ranks(GetParam(), [](const Ends& ranks) {
    std::vector<std::int64_t> sent;
    std::vector<std::int64_t> received;
    std::vector<char> data;
    for (int peer = 0; peer < ranks->size(); ++peer) {
      sent.push_back(count(ranks->rank(), peer));
      received.push_back(count(peer, ranks->rank()));
      data.insert(data.end(), static_cast<std::size_t>(sent.back()), value(ranks->rank(), peer));
    }
    for (int round = 0; round < 3; ++round) {
      std::vector<char> into(
          static_cast<std::size_t>(std::accumulate(received.begin(), received.end(), std::int64_t{0})));
      ranks->all_to_all(data.data(), sent, into.data(), received)->wait();
      auto at = into.begin();
      for (int peer = 0; peer < ranks->size(); ++peer) {
        for (std::int64_t i = 0; i < received[static_cast<std::size_t>(peer)]; ++i) {
          EXPECT_EQ(*at++, value(peer, ranks->rank()));
        }
      }
    }
  });
}

TEST_P(Sizes, BlocksOfAPairAreMatchedInTheirOrder) {
  run_ranks(GetParam(), [](const Ends& ranks) {
    const int next = (ranks->rank() + 1) % ranks->size();
    const int last = (ranks->rank() + ranks->size() - 1) % ranks->size();
    const std::array<char, 3> sent = {value(ranks->rank(), 0), value(ranks->rank(), 1), value(ranks->rank(), 2)};
    std::array<char, 3> came{};
    const std::array sends = {SendBlock{next, sent.data(), 1}, SendBlock{next, sent.data() + 1, 2}};
    const std::array receives = {ReceiveBlock{last, came.data() + 2, 1}, ReceiveBlock{last, came.data(), 2}};
    ranks->start(Operation::exchange, sends, receives, kCpu)->wait();
    EXPECT_EQ(came, (std::array{value(last, 1), value(last, 2), value(last, 0)}));
  });
}

TEST_P(Sizes, AllGatherOfUnevenCountsSomeOfThemNone) {
  run_ranks(GetParam(), [](const Ends& ranks) {
    std::vector<std::int64_t> bytes;
    std::vector<char> expected;
    for (int peer = 0; peer < ranks->size(); ++peer) {
      bytes.push_back(count(peer, 1));
      expected.insert(expected.end(), static_cast<std::size_t>(bytes.back()), value(peer, 0));
    }
    const std::vector<char> mine(4, value(ranks->rank(), 0));
    std::vector<char> all(expected.size());
    ranks->all_gather(mine.data(), all.data(), bytes)->wait();
    EXPECT_EQ(all, expected);
  });
}

TEST_P(Sizes, ExchangeGoesRound) {
  run_ranks(GetParam(), [](const Ends& ranks) {
    const int size = ranks->size();
    int carried = ranks->rank();
    for (int step = 0; step < size; ++step) {
      int next = -1;
      const auto pending = ranks->exchange({(ranks->rank() + 1) % size, &carried, sizeof(int)},
                                           {(ranks->rank() + size - 1) % size, &next, sizeof(int)});
      EXPECT_EQ(next, -1) << "it came before it was waited for";
      pending->wait();
      EXPECT_EQ(next, (ranks->rank() + size - step - 1) % size);
      carried = next;
    }
  });
}

TEST_P(Sizes, NobodyLeavesABarrierBeforeAllHaveCome) {
  std::atomic<int> come{0};
  run_ranks(GetParam(), [&](const Ends& ranks) {
    for (int round = 1; round <= 20; ++round) {
      ++come;
      ranks->barrier();
      EXPECT_GE(come, round * ranks->size());
      ranks->barrier();
    }
  });
}

INSTANTIATE_TEST_SUITE_P(, Sizes, ::testing::Values(1, 2, 3, 4, 8));

TEST(Split, MakesGroupsInTheOrderOfKeys) {
  run_ranks(6, [](const Ends& ranks) {
    for (int round = 0; round < 2; ++round) {
      const Ends group = ranks->split(ranks->rank() % 2, -ranks->rank());
      EXPECT_EQ(group->size(), 3);
      EXPECT_EQ(group->rank(), 2 - ranks->rank() / 2);
      const int mine = ranks->rank();
      std::vector<int> all(3);
      group->all_gather(&mine, all.data(), std::vector<std::int64_t>(3, sizeof(int)))->wait();
      EXPECT_EQ(all, (std::vector{4 + mine % 2, 2 + mine % 2, mine % 2}));
      ranks->barrier();
    }
  });
}

TEST(ThreadWorld, ARankThatThrowsEndsTheOthersAtOnce) {
  const auto start = Clock::now();
  std::atomic<int> told{0};
  const auto body = [&](const Ends& ranks) {
    if (ranks->rank() == 2) throw std::runtime_error("out of luck");
    const std::string text = error_text<CommunicationError>([&] { ranks->barrier(); });
    expect_contains(text, {"rank 2", "out of luck"});
    EXPECT_THROW(ranks->barrier(), CommunicationError) << "and so does what is called later";
    ++told;
  };
  EXPECT_THROW(run_ranks(4, body, Seconds(600)), std::runtime_error);
  EXPECT_EQ(told, 3);
  EXPECT_LT(Seconds(Clock::now() - start).count(), 10);
}

TEST(ThreadWorld, ALostRankIsAnErrorAfterTheTimeout) {
  const auto start = Clock::now();
  const auto body = [](const Ends& ranks) {
    if (ranks->rank() != 1) ranks->barrier();
  };
  const std::string text = error_text<TimeoutError>([&] { run_ranks(3, body, Seconds(0.2)); });
  expect_contains(text, {"rank 1", "0.2 s", "barrier"});
  const double seconds = Seconds(Clock::now() - start).count();
  EXPECT_GE(seconds, 0.2);
  EXPECT_LT(seconds, 10);
}

TEST(ThreadWorld, AnErrorInASubGroupReachesAll) {
  const auto body = [](const Ends& ranks) {
    const std::string text = error_text<CommunicationError>([&] {
      const Ends group = ranks->split(ranks->rank() / 2, 0);
      if (ranks->rank() == 3) group->abort("the reason");
      for (;;) ranks->barrier();
    });
    expect_contains(text, {"rank 3 failed: the reason"});
  };
  run_ranks(4, body);
}

TEST(ThreadWorld, DifferentOperationsAreToldApart) {
  const auto other_operation = [](const Ends& ranks) {
    char byte = 0;
    if (ranks->rank() == 0) {
      ranks->barrier();
    } else {
      ranks->all_gather(&byte, std::vector<char>(2).data(), std::vector<std::int64_t>{1, 1})->wait();
    }
  };
  expect_contains(error_text<CommunicationError>([&] { run_ranks(2, other_operation); }), {"barrier", "all_gather"});
  const auto other_size = [](const Ends& ranks) {
    std::vector<char> bytes(8);
    const int peer = 1 - ranks->rank();
    ranks->exchange({peer, bytes.data(), 2 + ranks->rank()}, {peer, bytes.data() + 4, 2})->wait();
    ranks->barrier();
  };
  expect_contains(error_text<CommunicationError>([&] { run_ranks(2, other_size); }), {"expects 2 bytes", "sent 3"});
}

TEST(ThreadWorld, ItsArgumentsAreChecked) {
  expect_contains(error_text<ValueError>([] { ThreadWorld(0); }), {"0 ranks"});
  expect_contains(error_text<ValueError>([] { ThreadWorld(1, Seconds(0)); }), {"0 s"});
  expect_contains(error_text<ValueError>([] { ThreadWorld(1, Seconds(NAN)); }), {"nan"});
  expect_contains(error_text<ValueError>([] { static_cast<void>(ThreadWorld(2).communicator(2)); }),
                  {"no rank 2 in a world of 2"});
}

}  // namespace
}  // namespace ditattn::parallel
