// What ranks refuse together before anything moves, what they do when one fails on the way, and that calls of a layer
// can follow on each other.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <mutex>

#include "ditattn/parallel.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn::parallel {
namespace {

using ditattn::testing::counting;
using ditattn::testing::error_text;
using ditattn::testing::expect_contains;
using ditattn::testing::LogRecorder;
using ditattn::testing::ToyBackend;
using Ends = std::shared_ptr<Communicator>;

constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kSize = 8;

// One rank's call, of which a test changes what it likes.
struct Call {
  ImplConfig config{.num_heads = kHeads, .head_size = kSize};
  Tensor query = counting({2, 3, kHeads, kSize});
  Tensor key = counting({2, 5, kHeads, kSize});
  Tensor value = counting({2, 5, kHeads, kSize});
  AttentionMetadataFields fields = {};
  ForwardOutputs outputs = {};
  BackendClass backend = std::make_shared<ToyBackend>();
};

// What each rank's call throws, "" where it computes.
std::vector<std::string> errors_of(const Mesh& mesh, const std::function<void(int rank, Call&)>& change,
                                   Seconds timeout = Seconds(20)) {
  const int size = mesh.ulysses * mesh.second();
  std::vector<std::string> texts(static_cast<std::size_t>(size));
  run_ranks(
      size,
      [&](const Ends& ranks) {
        Call call;
        change(ranks->rank(), call);
        ParallelAttention layer(call.backend, call.config, std::make_shared<ParallelGroup>(ranks, mesh));
        try {
          layer.forward(call.query, call.key, call.value, AttentionMetadata(call.fields), call.outputs);
          ranks->barrier();  // a rank that another one's failure does not concern learns of it here
        } catch (const Error& error) {
          texts[static_cast<std::size_t>(ranks->rank())] =
              fmt::format("{}: {}", std::string(error.kind()), error.message());
        }
      },
      timeout);
  return texts;
}

// All ranks' errors have these words.
void expect_all(const std::vector<std::string>& texts, const std::vector<std::string>& parts) {
  for (const std::string& text : texts) expect_contains(text, parts);
}

// --- Meshes
// -----------------------------------------------------------------------------------------------------------

TEST(Mesh, NamesAndTexts) {
  EXPECT_EQ(mesh_name({.ulysses = 2, .ring = 4}), "ulysses=2, ring=4");
  EXPECT_EQ(mesh_name({}), "1 rank");
  EXPECT_EQ(parse_mesh("ulysses=2, ring=4"), (Mesh{.ulysses = 2, .ring = 4}));
  EXPECT_EQ(parse_mesh("allgather=3"), (Mesh{.allgather = 3}));
  EXPECT_EQ(parse_mesh(""), Mesh{});
  for (const char* wrong :
       {"ulysses", "ulysses=", "ulysses=0", "ulysses=-2", "usp=2", "ring=2x", "ring=99999999999", ","}) {
    expect_contains(error_text<ValueError>([&] { static_cast<void>(parse_mesh(wrong)); }), {"is no degree", wrong});
  }
}

TEST(Mesh, BalancedLengths) {
  EXPECT_EQ(balanced_lengths(10, 4), (std::vector<std::int64_t>{3, 3, 2, 2}));
  EXPECT_EQ(balanced_lengths(2, 4), (std::vector<std::int64_t>{1, 1, 0, 0}));
  EXPECT_THROW(static_cast<void>(balanced_lengths(-1, 4)), ValueError);
}

TEST(Mesh, AllOfANumberOfRanks) {
  const std::vector<Mesh> of_four = {
      {.ulysses = 4}, {.ulysses = 2, .ring = 2}, {.ulysses = 2, .allgather = 2}, {.ring = 4}, {.allgather = 4}};
  EXPECT_EQ(meshes_of(4), of_four);
  EXPECT_EQ(meshes_of(1), std::vector<Mesh>{Mesh{}});
  EXPECT_TRUE(meshes_of(0).empty());
}

TEST(Mesh, DegreesThatDoNotFitAreRefusedOnAllRanksWithThoseThatDo) {
  const auto text_of = [](int size, const std::function<Mesh(int rank)>& mesh) {
    std::atomic<int> refused{0};
    std::mutex mutex;
    std::string text;
    run_ranks(size, [&](const Ends& ranks) {
      const std::string mine = error_text<ValueError>([&] { ParallelGroup(ranks, mesh(ranks->rank())); });
      ++refused;
      ranks->barrier();  // of use still
      std::lock_guard lock(mutex);
      text = mine;
    });
    EXPECT_EQ(refused, size);
    return text;
  };
  expect_contains(text_of(6, [](int) { return Mesh{.ulysses = 4}; }),
                  {"ulysses=4 takes 4 ranks, there are 6", "ulysses=6; ulysses=3, ring=2; ulysses=2, ring=3; ring=6"});
  expect_contains(text_of(4, [](int) { return Mesh{.ulysses = 0}; }), {"A degree of 0 among 4 ranks", "ring=4"});
  expect_contains(text_of(4, [](int) { return Mesh{.ring = 2, .allgather = 2}; }),
                  {"ring=2 and allgather=2", "exclude"});
  expect_contains(text_of(3, [](int rank) { return rank == 2 ? Mesh{.ring = 3} : Mesh{.ulysses = 3}; }),
                  {"rank 0 has ulysses=3, rank 2 has ring=3"});
}

// --- Refusals
// ---------------------------------------------------------------------------------------------------------

class RefusedTogether : public ::testing::TestWithParam<Mesh> {};

TEST_P(RefusedTogether, WhatDiffersBetweenRanks) {
  const auto differs = [&](const std::vector<std::string>& parts, const std::function<void(Call&)>& change) {
    const auto texts = errors_of(GetParam(), [&](int rank, Call& call) {
      if (rank == 1) change(call);
    });
    expect_all(texts, parts);
  };
  differs({"ValueError", "Ranks 0 and 1 differ in batch: 2 and 3"}, [](Call& call) {
    call.query = counting({3, 3, kHeads, kSize});
    call.key = call.value = counting({3, 5, kHeads, kSize});
  });
  differs({"ValueError", "differ in dtype"}, [](Call& call) {
    call.query = counting({2, 3, kHeads, kSize}, kFloat16);
    call.key = call.value = counting({2, 5, kHeads, kSize}, kFloat16);
  });
  differs({"ValueError", "differ in num_heads: 4 and 6"}, [](Call& call) {
    call.config.num_heads = 6;
    call.query = counting({2, 3, 6, kSize});
    call.key = call.value = counting({2, 5, 6, kSize});
  });
  differs({"ValueError", "differ in the layer"}, [](Call& call) { call.config.causal = true; });
  differs({"ValueError", "differ in the layer"}, [](Call& call) { call.config.softmax_scale = 3; });
  differs({"ValueError", "differ in whether an LSE is wanted"}, [](Call& call) {
    call.outputs.lse = empty({2, kHeads, 3}, kFloat32);
  });
  differs({"ValueError", "differ in valid_kv_length: -1 and 4"},
          [](Call& call) { call.fields.extra.Set("valid_kv_length", std::int64_t{4}); });
  differs({"ValueError", "differ in attn_mask"}, [](Call& call) { call.fields.attn_mask = counting({2, 10}); });
  differs({"ValueError", "differ in full_attn_spans"}, [](Call& call) { call.fields.full_attn_spans.emplace(1); });
}

TEST_P(RefusedTogether, WhatOneRankCannotDo) {
  const auto texts = errors_of(GetParam(), [&](int rank, Call& call) {
    if (rank == 1) call.key = counting({2, 5, kHeads, kSize + 1});
  });
  for (std::size_t rank = 0; rank < texts.size(); ++rank) {
    expect_contains(texts[rank], {"key has head_size=9, expected 8"});
    expect_contains(texts[rank], {rank == 1 ? "ValueError: key" : "RuntimeError: Rank 1 refused the call: ValueError"});
  }
}

TEST_P(RefusedTogether, ATensorThatIsMissing) {
  const auto texts = errors_of(GetParam(), [&](int rank, Call& call) {
    if (rank == 1) call.query = Tensor();
  });
  for (std::size_t rank = 0; rank < texts.size(); ++rank) {
    expect_contains(texts[rank], {"query is missing"});
    expect_contains(texts[rank],
                    {rank == 1 ? "ValueError: query" : "RuntimeError: Rank 1 refused the call: ValueError"});
  }
}

TEST_P(RefusedTogether, WhatOneRankDoesNotEvenCall) {
  run_ranks(GetParam().ulysses * GetParam().second(), [&](const Ends& ranks) {
    const Call call;
    ParallelAttention layer(call.backend, call.config, std::make_shared<ParallelGroup>(ranks, GetParam()));
    const auto forward = [&] { layer.forward(call.query, call.key, call.value); };
    if (ranks->rank() == 1) {
      layer.refuse("it has no tensors", kCpu);
    } else {
      expect_contains(error_text<CommunicationError>(forward), {"Rank 1 refused the call: it has no tensors"});
    }
    EXPECT_NO_THROW(forward()) << "of use still";
  });
}

TEST_P(RefusedTogether, NotThatNoMetadataIsEmptyMetadata) {
  run_ranks(GetParam().ulysses * GetParam().second(), [&](const Ends& ranks) {
    const Call call;
    ParallelAttention layer(call.backend, call.config, std::make_shared<ParallelGroup>(ranks, GetParam()));
    const auto metadata = ranks->rank() == 1 ? AttentionMetadata() : AttentionMetadata(AttentionMetadataFields{});
    EXPECT_NO_THROW(layer.forward(call.query, call.key, call.value, metadata));
  });
}

// The whole's keys, of which each rank has a part.
TEST_P(RefusedTogether, WhatIsWrongWithTheWhole) {
  const auto all_wrong = [&](const std::vector<std::string>& parts, const std::function<void(Call&)>& change) {
    expect_all(errors_of(GetParam(), [&](int, Call& call) { change(call); }), parts);
  };
  all_wrong({"ValueError", "attn_mask of shape (2, 5) does not broadcast"}, [](Call& call) {
    call.fields.attn_mask = counting({2, 5});
  });
  all_wrong({"ValueError", "valid_kv_length", "11 for length 10"},
            [](Call& call) { call.fields.extra.Set("valid_kv_length", std::int64_t{11}); });
  all_wrong({"ValueError", "TOY does not support packed"}, [](Call& call) {
    const Tensor offsets = empty({2}, kInt32);
    store_element(offsets.data_ptr(), 0, kInt32, 0);
    store_element(offsets.data_ptr(), 1, kInt32, 6);
    const Tensor key_offsets = empty({2}, kInt32);
    store_element(key_offsets.data_ptr(), 0, kInt32, 0);
    store_element(key_offsets.data_ptr(), 1, kInt32, 10);
    call.fields.extra.Set("cu_seqlens_q", offsets);
    call.fields.extra.Set("cu_seqlens_k", key_offsets);
    call.fields.extra.Set("max_seqlen_q", std::int64_t{6});
    call.fields.extra.Set("max_seqlen_k", std::int64_t{10});
  });
  all_wrong({"ValueError", "out must have shape (2, 3, 4, 8), got (2, 6, 4, 8)"}, [](Call& call) {
    call.outputs.out = empty({2, 6, kHeads, kSize}, kFloat32);
  });
}

INSTANTIATE_TEST_SUITE_P(, RefusedTogether,
                         ::testing::Values(Mesh{.ulysses = 2}, Mesh{.ring = 2}, Mesh{.allgather = 2}));

// Only what merges results needs an LSE.
TEST(ParallelAttention, ABackendWithoutLseIsRefusedWhereItsResultsWouldBeMerged) {
  Capabilities can = ditattn::testing::toy_capabilities();
  can.lse = false;
  const auto without_lse = [&](int, Call& call) { call.backend = std::make_shared<ToyBackend>("TOY", 1, can); };
  expect_all(errors_of({.ring = 2}, without_lse), {"ValueError", "TOY does not return the log-sum-exp"});
  expect_all(errors_of({.allgather = 2}, without_lse), {"ValueError", "TOY does not return the log-sum-exp"});
  EXPECT_EQ(errors_of({.ulysses = 2}, without_lse), (std::vector<std::string>{"", ""}));
}

TEST(ParallelAttention, RanksWithoutHeadsAreWarnedOfAndTakePart) {
  LogRecorder log;
  EXPECT_EQ(errors_of({.ulysses = 6}, [](int, Call&) {}), std::vector<std::string>(6));
  const auto warnings = log.of(LogLevel::warning);
  ASSERT_EQ(warnings.size(), 1U);
  expect_contains(warnings[0], {"ulysses=6 shares out 4 heads", "2 of 6 ranks"});
}

// --- Failures on the way
// ----------------------------------------------------------------------------------------------

// Throws at the n-th call of all ranks together.
class FailingImpl final : public AttentionImpl {
 public:
  FailingImpl(const ImplConfig& config, std::atomic<int>& left) : AttentionImpl(config), left_(left) {}
  void run(const AttentionCall& call) const override {
    if (--left_ == 0) throw MemoryError("no memory for the scores");
    ditattn::testing::ToyImpl(config(), 1).run(call);
  }

 private:
  std::atomic<int>& left_;
};

class FailingBackend final : public ToyBackend {
 public:
  explicit FailingBackend(std::atomic<int>& left) : left_(left) {}

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<FailingImpl>(config, left_);
  }

 private:
  std::atomic<int>& left_;
};

TEST(ParallelAttention, ARankThatFailsOnTheWayEndsTheOthersAtOnce) {
  for (const Mesh mesh : {Mesh{.ring = 4}, Mesh{.ulysses = 4}, Mesh{.ulysses = 2, .allgather = 2}}) {
    SCOPED_TRACE(mesh_name(mesh));
    std::atomic<int> left{3};
    const auto backend = std::make_shared<FailingBackend>(left);
    const auto start = std::chrono::steady_clock::now();
    const auto texts = errors_of(
        mesh, [&](int, Call& call) { call.backend = backend; }, Seconds(600));
    EXPECT_LT(Seconds(std::chrono::steady_clock::now() - start).count(), 10);
    int own = 0;
    for (const std::string& text : texts) {
      expect_contains(text, {"no memory for the scores"});
      own += text.starts_with("MemoryError") ? 1 : 0;
    }
    EXPECT_EQ(own, 1);
  }
}

TEST(ParallelAttention, ARankThatNeverCallsIsAnErrorAfterTheTimeout) {
  const auto body = [](const Ends& ranks) {
    const Call call;
    ParallelAttention layer(call.backend, call.config, std::make_shared<ParallelGroup>(ranks, Mesh{.ring = 3}));
    layer.forward(call.query, call.key, call.value);
    if (ranks->rank() != 1) layer.forward(call.query, call.key, call.value);
  };
  expect_contains(error_text<TimeoutError>([&] { run_ranks(3, body, Seconds(0.3)); }),
                  {"rank 1", "0.3 s", "all_gather"});
}

TEST(ParallelAttention, AnotherExceptionOfABackendArrivesAsItIs) {
  std::atomic<int> left{0};
  const auto body = [&](const Ends& ranks) {
    const Call call;
    ParallelAttention layer(call.backend, call.config, std::make_shared<ParallelGroup>(ranks, Mesh{.ulysses = 2}));
    layer.forward(call.query, call.key, call.value);
    if (ranks->rank() == 0) throw std::out_of_range("between two calls");
    layer.forward(call.query, call.key, call.value);
  };
  EXPECT_THROW(run_ranks(2, body), std::out_of_range);
}

// --- Results
// ----------------------------------------------------------------------------------------------------------

// The toy's answer is the mean of V, whoever computes it: layers share a group, calls follow on each other with other
// sizes, and the memory that they reuse shows nothing of the calls before.
TEST(ParallelAttention, CallsFollowOnEachOther) {
  for (const Mesh mesh : {Mesh{.ring = 4}, Mesh{.ulysses = 4}, Mesh{.ulysses = 2, .ring = 2}, Mesh{.allgather = 4}}) {
    SCOPED_TRACE(mesh_name(mesh));
    run_ranks(4, [&](const Ends& ranks) {
      const auto group = std::make_shared<ParallelGroup>(ranks, mesh);
      const auto backend = std::make_shared<ToyBackend>();
      ParallelAttention first(backend, {.num_heads = kHeads, .head_size = kSize}, group);
      ParallelAttention second(backend, {.num_heads = 2, .head_size = 4}, group);
      for (const std::int64_t tokens : {5, 1, 9, 3}) {
        for (auto& [layer, heads, size] :
             {std::tuple(&first, kHeads, kSize), std::tuple(&second, std::int64_t{2}, std::int64_t{4})}) {
          const double own = static_cast<double>(ranks->rank()) + static_cast<double>(tokens);
          const Tensor query = counting({1, 2, heads, size});
          const Tensor key = counting({1, tokens, heads, size});
          const Tensor value = empty({1, tokens, heads, size}, kFloat32);
          for (std::int64_t i = 0; i < value.numel(); ++i) store_element(value.data_ptr(), i, kFloat32, own);
          const Tensor lse = empty({1, heads, 2}, kFloat32);
          const Tensor out = layer->forward(query, key, value, {}, {.lse = lse});
          const double mean = 1.5 + static_cast<double>(tokens);  // of all four ranks'
          for (std::int64_t i = 0; i < out.numel(); ++i) {
            ASSERT_NEAR(load_element(out.data_ptr(), i, kFloat32), mean, 1e-5);
          }
          for (std::int64_t i = 0; i < lse.numel(); ++i) {
            ASSERT_NEAR(load_element(lse.data_ptr(), i, kFloat32), std::log(4. * static_cast<double>(tokens)), 1e-5);
          }
        }
      }
    });
  }
}

}  // namespace
}  // namespace ditattn::parallel
