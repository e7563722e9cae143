// Float64 attention of single rows, as the guard and the tuner compute it, against the oracle, which shares nothing
// with it; and errors of a known size against what is measured.

#include "core/row_reference.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <tuple>

#include "backends/reference/reference.hpp"
#include "tests/conformance/inputs.hpp"
#include "tests/conformance/random_problem.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

constexpr CausalAlignment kAlignments[] = {CausalAlignment::top_left, CausalAlignment::bottom_right};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Question {
  Tensor query, key, value;
  AttentionMetadata metadata;
  double scale;
  bool causal;
  CausalAlignment alignment;
  std::int64_t rows;
  Tensor lse = {};
};

std::vector<Row> some_rows(const Question& q, std::uint64_t seed) {
  return sample_rows(
      {.batch = q.query.size(0), .num_heads = q.query.size(2), .seq_q = q.rows, .head_size = q.query.size(3)}, 12,
      seed);
}

reference::Result oracle(const Question& q, const std::vector<Row>& rows) {
  std::vector<reference::Row> wanted;
  wanted.reserve(rows.size());
  for (const Row& row : rows) wanted.push_back({row.batch, row.head, row.query});
  return reference::attention(q.query, q.key, q.value, q.metadata, q.scale, q.causal, q.alignment, wanted);
}

// ‖a − b‖ / ‖Σ P·|V|‖; infinite where NaN or infinity stand in one alone.
double distance(const std::vector<double>& a, const std::vector<double>& b, const std::vector<double>& magnitudes) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) {
      if (std::isnan(a[i]) ? !std::isnan(b[i]) : a[i] != b[i]) return kInfinity;
      continue;
    }
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += magnitudes[i] * magnitudes[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

// The worse of the distances of out and Σ P·|V| from the oracle's.
double distance_from_oracle(const Question& q, std::uint64_t seed) {
  const std::vector<Row> rows = some_rows(q, seed);
  const std::vector<RowAnswer> got =
      answer_rows({q.query, q.key, q.value, q.query, q.lse, q.metadata}, q.scale, q.causal, q.alignment, rows);
  const reference::Result expected = oracle(q, rows);
  std::vector<double> out;
  std::vector<double> abs;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    EXPECT_EQ(got[r].sees_keys, expected.lse[r] != -kInfinity);
    out.insert(out.end(), got[r].out.begin(), got[r].out.end());
    abs.insert(abs.end(), got[r].abs.begin(), got[r].abs.end());
  }
  return std::max(distance(out, expected.out, expected.abs), distance(abs, expected.abs, expected.abs));
}

Capabilities everything() {
  Capabilities can;
  can.dtypes = {kFloat32, kFloat16, kBFloat16};
  return can;
}

TEST(RowReference, MatchesTheOracleOverAllMetadata) {
  double worst = 0;
  for (std::uint64_t seed = 5000; seed < 5400 && !HasFailure(); ++seed) {
    const conformance::Drawn drawn = conformance::draw_problem(seed, everything());
    for (const CausalAlignment alignment : kAlignments) {
      SCOPED_TRACE(drawn.text);
      const double scale = 1 / std::sqrt(static_cast<double>(drawn.config.head_size));
      const double error = distance_from_oracle(
          {drawn.query, drawn.key, drawn.value, drawn.metadata, scale, drawn.config.causal, alignment, drawn.rows},
          seed);
      EXPECT_LE(error, 1e-12);
      worst = std::max(worst, error);
    }
  }
  fmt::print("worst distance from the oracle: {:.1e}\n", worst);
}

// Padding of the joined keys is one length per batch entry, which may end in either tensor.
TEST(RowReference, MatchesTheOracleWherePaddingEndsAnywhereInJoinedKeys) {
  double worst = 0;
  for (const char* strategy : {"front", "rear"}) {
    for (std::int64_t length = 0; length <= 14; ++length) {
      const Tensor mask = empty({2, 14}, kBool);
      for (std::int64_t i = 0; i < 28; ++i) store_element(mask.data_ptr(), i, kBool, i % 14 < (i < 14 ? length : 8));
      AttentionMetadataFields fields{.attn_mask = mask, .joint_strategy = strategy};
      std::mt19937_64 generator(static_cast<std::uint64_t>(length));
      std::normal_distribution<double> normal;
      const auto tensor = [&](std::int64_t tokens, std::int64_t heads) {
        Tensor made = empty({2, tokens, heads, 8}, kFloat32);
        for (std::int64_t i = 0; i < made.numel(); ++i) store_element(made.data_ptr(), i, kFloat32, normal(generator));
        return made;
      };
      fields.joint_query = tensor(3, 4);
      fields.joint_key = tensor(5, 2);
      fields.joint_value = tensor(5, 2);
      const Question question{tensor(6, 4), tensor(9, 2), tensor(9, 2),   AttentionMetadata(fields),
                              0.4,          false,        kAlignments[0], 9};
      ASSERT_EQ(question.metadata->mask_description().kind == MaskDescription::Kind::dense, false);
      const double error = distance_from_oracle(question, 3);
      EXPECT_LE(error, 1e-12) << strategy << ", " << length << " keys";
      worst = std::max(worst, error);
    }
  }
  fmt::print("worst distance from the oracle: {:.1e}\n", worst);
}

// Strided, broadcast and reversed tensors; masks of every rank and dtype; NaN where nobody looks, and where some do.
TEST(RowReference, MatchesTheOracleOverAllLayoutsAndMasks) {
  double worst = 0;
  std::uint64_t seed = 300;
  for (const char* file : {"pairwise", "adversarial"}) {
    for (const conformance::Case& c : conformance::load_cases(file)) {
      if (c.seq_q == 0 || c.seq_kv == 0 || c.batch == 0) continue;
      SCOPED_TRACE(c.line);
      const CausalAlignment alignment = kAlignments[++seed % 2];
      const conformance::Inputs inputs = conformance::make_inputs(c, alignment, seed);
      const double error = distance_from_oracle(
          {inputs.query, inputs.key, inputs.value, inputs.metadata, c.softmax_scale(), c.causal, alignment, c.seq_q},
          seed);
      // Logits of 10⁶ are themselves known to 10⁻¹⁰ only.
      const double bound = c.input == conformance::Input::normal || c.input == conformance::Input::tiny ? 1e-12 : 1e-8;
      EXPECT_LE(error, bound);
      worst = std::max(worst, error / bound);
      if (HasFailure()) return;
    }
  }
  fmt::print("worst distance from the oracle: {:.1e} of the bound\n", worst);
}

// A question whose output is the answer, rounded to float64, which can be written.
class PlantedErrors : public ::testing::Test {
 protected:
  PlantedErrors() {
    std::mt19937_64 generator(77);
    std::normal_distribution<double> normal;
    for (const Tensor& tensor : {question_.query, question_.key, question_.value}) {
      for (std::int64_t i = 0; i < tensor.numel(); ++i)
        store_element(tensor.data_ptr(), i, tensor.dtype(), normal(generator));
    }
    for (std::int64_t i = 0; i < 7; ++i) mask_row(2, i);
    question_.metadata = AttentionMetadata({.attn_mask = mask_});
    const reference::Result answer = reference::attention(question_.query, question_.key, question_.value,
                                                          question_.metadata, question_.scale, false, kAlignments[0]);
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t h = 0; h < 4; ++h) {
        for (std::int64_t i = 0; i < 9; ++i) {
          rows_.push_back({b, h, i});
          for (std::int64_t d = 0; d < 5; ++d) {
            const double expected = answer.out[static_cast<std::size_t>(((b * 4 + h) * 9 + i) * 5 + d)];
            squares_ += expected * expected;
            magnitudes_ += std::pow(answer.abs[static_cast<std::size_t>(((b * 4 + h) * 9 + i) * 5 + d)], 2);
            at(b, h, i, d) = expected;
          }
        }
      }
    }
  }

  double& at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    return static_cast<double*>(out_.data_ptr())[((b * 9 + i) * 4 + h) * 5 + d];
  }
  // Row `row` sees no key.
  void mask_row(std::int64_t row, std::int64_t key) {
    if (key == 0) {
      for (std::int64_t i = 0; i < mask_.numel(); ++i) store_element(mask_.data_ptr(), i, kBool, 1);
    }
    store_element(mask_.data_ptr(), row * 7 + key, kBool, 0);
  }
  [[nodiscard]] RowErrors measured() const {
    const Question& q = question_;
    return check_rows({q.query, q.key, q.value, out_, q.lse, q.metadata}, q.scale, q.causal, q.alignment, rows_);
  }

  Tensor mask_ = empty({1, 1, 9, 7}, kBool);
  Question question_{empty({2, 9, 4, 5}, kFloat32),
                     empty({2, 7, 2, 5}, kFloat32),
                     empty({2, 7, 2, 5}, kFloat32),
                     AttentionMetadata(nullptr),
                     0.7,
                     false,
                     kAlignments[0],
                     9};
  Tensor out_ = empty({2, 9, 4, 5}, kFloat64);
  std::vector<Row> rows_;
  double squares_ = 0;
  double magnitudes_ = 0;
};

TEST_F(PlantedErrors, NoneIsMeasuredAsNone) {
  const RowErrors errors = measured();
  EXPECT_LE(errors.rel_l2, 1e-14);
  EXPECT_LE(errors.max_abs, 1e-14);
  EXPECT_EQ(errors.wrong_non_finite, 0);
  EXPECT_EQ(errors.nonzero_without_keys, 0);
  EXPECT_EQ(errors.rows, 72);
}

TEST_F(PlantedErrors, AreMeasuredAsWhatTheyAre) {
  for (const double planted : {1e-6, 1e-3, 0.1, 10.}) {
    at(1, 3, 8, 4) += planted;
    const RowErrors errors = measured();
    EXPECT_NEAR(errors.max_abs / planted, 1, 1e-8);
    EXPECT_NEAR(errors.rel_l2 / (planted / std::sqrt(squares_)), 1, 1e-8);
    EXPECT_NEAR(errors.rel_l2_abs / (planted / std::sqrt(magnitudes_)), 1, 1e-8);
    at(1, 3, 8, 4) -= planted;
  }
}

TEST_F(PlantedErrors, AFactorIsItsDistanceFromOne) {
  for (std::int64_t i = 0; i < out_.numel(); ++i) static_cast<double*>(out_.data_ptr())[i] *= 1.1;
  EXPECT_NEAR(measured().rel_l2, 0.1, 1e-12);
  EXPECT_LE(measured().worst_row, 0.1 + 1e-12);
  EXPECT_GE(measured().worst_row, 0.05);
}

TEST_F(PlantedErrors, TheWorstRowIsTheOneThatIsWrong) {
  for (std::int64_t d = 0; d < 5; ++d) at(1, 2, 6, d) *= 1.5;
  EXPECT_EQ(measured().worst, (Row{1, 2, 6}));
  rows_ = {{1, 2, 6}};
  const double alone = measured().rel_l2;
  EXPECT_NEAR(alone, 0.5, 1e-12);
  EXPECT_LE(measured().worst_row, alone + 1e-12) << "where values cancel by chance, it is less";
}

// One key: the answer is its value, whose length is the random sum; the logit is all there is to round.
TEST_F(PlantedErrors, SizesOfARowWithOneKey) {
  for (std::int64_t key = 1; key < 7; ++key) mask_row(3, key);
  const Question& q = question_;
  const std::vector<Row> row = {{0, 1, 3}};
  const RowAnswer answer =
      answer_rows({q.query, q.key, q.value, out_, q.lse, q.metadata}, q.scale, q.causal, q.alignment, row).front();
  const auto length = [](const Tensor& tensor, std::int64_t first) {
    double squares = 0;
    for (std::int64_t d = 0; d < 5; ++d) squares += std::pow(load_element(tensor.data_ptr(), first + d, kFloat32), 2);
    return std::sqrt(squares);
  };
  EXPECT_NEAR(answer.random_sum, length(q.value, 0), 1e-14);
  EXPECT_NEAR(answer.logit_size, q.scale * length(q.query, (3 * 4 + 1) * 5) * length(q.key, 0), 1e-14);
}

TEST_F(PlantedErrors, NotFiniteIsCountedAndNoErrorOfTheRest) {
  at(0, 0, 0, 0) = std::numeric_limits<double>::quiet_NaN();
  at(1, 1, 1, 1) = kInfinity;
  EXPECT_EQ(measured().wrong_non_finite, 2);
  EXPECT_LE(measured().rel_l2, 1e-14);
  store_element(question_.query.data_ptr(), 0, kFloat32, NAN);  // row (0, 0, 0) has no answer but NaN
  EXPECT_EQ(measured().wrong_non_finite, 1 + 4);
}

TEST_F(PlantedErrors, WhereNoKeyIsSeenThereIsZero) {
  EXPECT_EQ(at(1, 2, 2, 3), 0);
  at(1, 2, 2, 3) = 1e-30;
  EXPECT_EQ(measured().nonzero_without_keys, 1);
  rows_ = {{1, 2, 2}};
  EXPECT_EQ(measured().rel_l2, kInfinity);
  at(1, 2, 2, 3) = 0;
  EXPECT_EQ(measured().rel_l2, 0);
}

TEST_F(PlantedErrors, RowsThatThereAreNotAreRefused) {
  for (const Row& row : {Row{2, 0, 0}, Row{0, 4, 0}, Row{0, 0, 9}, Row{0, 0, -1}}) {
    rows_ = {row};
    testing::expect_contains(testing::error_text<ValueError>([&] { static_cast<void>(measured()); }),
                             {fmt::format("no row (batch {}, head {}, query {})", row.batch, row.head, row.query),
                              "2 batch entries, 4 heads and 9 queries"});
  }
  question_.query = empty({2, 9, 4, 5}, kInt32);
  rows_ = {{0, 0, 0}};
  testing::expect_contains(testing::error_text<ValueError>([&] { static_cast<void>(measured()); }),
                           {"Rows of int32 cannot be checked", "bfloat16"});
}

TEST(SampleRows, AreDifferentAndSpread) {
  std::mt19937_64 generator(1);
  for (int trial = 0; trial < 500; ++trial) {
    const auto draw = [&](std::uint64_t most) { return static_cast<std::int64_t>(1 + generator() % most); };
    const Problem problem{.batch = draw(3), .num_heads = draw(24), .seq_q = draw(trial % 2 == 0 ? 8 : 3000)};
    const std::int64_t count = draw(64);
    SCOPED_TRACE(fmt::format("B={} H={} Sq={} count={}", problem.batch, problem.num_heads, problem.seq_q, count));
    const std::int64_t planes = problem.batch * problem.num_heads;
    const std::vector<Row> rows = sample_rows(problem, count, generator());
    const auto size = static_cast<std::int64_t>(rows.size());
    ASSERT_EQ(size, std::min(count, planes * problem.seq_q));
    std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> all;
    std::set<std::int64_t> heads;
    std::set<std::int64_t> positions;
    for (const Row& row : rows) {
      ASSERT_TRUE(row.batch < problem.batch && row.head < problem.num_heads && row.query < problem.seq_q);
      all.emplace(row.batch, row.head, row.query);
      heads.insert(row.batch * problem.num_heads + row.head);
      positions.insert(row.query);
    }
    EXPECT_EQ(static_cast<std::int64_t>(all.size()), size);
    EXPECT_EQ(static_cast<std::int64_t>(heads.size()), std::min(size, planes));
    EXPECT_EQ(static_cast<std::int64_t>(positions.size()), std::min(size, problem.seq_q));
    if (size > 1) {
      EXPECT_EQ(*positions.begin(), 0);
      EXPECT_EQ(*positions.rbegin(), problem.seq_q - 1);
    }
  }
}

TEST(SampleRows, DependOnTheSeedAlone) {
  const Problem problem{.batch = 2, .num_heads = 8, .seq_q = 1000};
  EXPECT_EQ(sample_rows(problem, 16, 5), sample_rows(problem, 16, 5));
  EXPECT_NE(sample_rows(problem, 16, 5), sample_rows(problem, 16, 6));
  EXPECT_TRUE(sample_rows(problem, 0, 5).empty());
  EXPECT_TRUE(sample_rows({.seq_q = 0}, 5, 5).empty());
}

}  // namespace
}  // namespace ditattn
