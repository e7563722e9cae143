// The cache's file: everything comes back; whatever is wrong with it is told once and never believed.

#include "tuner/tune_cache.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>

#include "tests/unit/tuner/tuner_fixture.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::LogRecorder;

const TunedFor kHere{{"device", "cpu"}, {"name", "Test CPU"}, {"threads", "2"}};

TunedProblem sample_problem() {
  return {.problem = {.batch = 2,
                      .num_heads = 24,
                      .num_kv_heads = 8,
                      .seq_q = 4096,
                      .seq_kv = 4173,
                      .head_size = 128,
                      .dtype = kBFloat16,
                      .mask = MaskKind::padding,
                      .causal = true,
                      .packed = true,
                      .joint = true,
                      .spans = true,
                      .fp8_kv = true,
                      .alignment = 4},
          .results = {{"FLASH_ATTN", "a.b.Class", "own kernels, \"AVX\"", 1.25, 2.5e-3, ""},
                      {"SAGE_ATTN", "a.b.Other", "", 0.1 + 0.2, 1.0 / 3, ""},
                      {"CUSTOM", "x.Y", "e", 0, 0, "refuses:\n\theads=24 \x01"}}};
}

void expect_same(const TunedProblem& a, const TunedProblem& b) {
  EXPECT_TRUE(same_measurement(a.problem, b.problem));
  ASSERT_EQ(a.results.size(), b.results.size());
  for (std::size_t i = 0; i < a.results.size(); ++i) {
    EXPECT_EQ(a.results[i].backend, b.results[i].backend);
    EXPECT_EQ(a.results[i].class_path, b.results[i].class_path);
    EXPECT_EQ(a.results[i].engine, b.results[i].engine);
    EXPECT_EQ(a.results[i].median_ms, b.results[i].median_ms);
    EXPECT_TRUE(a.results[i].error == b.results[i].error ||
                (!std::isfinite(a.results[i].error) && std::isnan(b.results[i].error)))
        << a.results[i].error << " became " << b.results[i].error;
    EXPECT_EQ(a.results[i].reason, b.results[i].reason);
  }
}

class TuneCache : public ::testing::Test {
 protected:
  void write(const std::string& content) const { std::ofstream(file_, std::ios::binary) << content; }
  [[nodiscard]] std::string content() const {
    std::ostringstream text;
    text << std::ifstream(file_, std::ios::binary).rdbuf();
    return text.str();
  }
  [[nodiscard]] fs::path aside() const { return file_.string() + ".set-aside"; }

  // The file is read as nothing, with one warning that has the parts; it is put aside.
  void expect_set_aside(const std::vector<std::string>& parts) {
    const LogRecorder log;
    EXPECT_TRUE(read_tune_cache(file_, kHere, false).empty());
    ASSERT_EQ(log.entries.size(), 1U);
    EXPECT_EQ(log.entries[0].first, LogLevel::warning);
    testing::expect_contains(log.entries[0].second, parts);
    testing::expect_contains(log.entries[0].second,
                             {fmt::format("Tuned choices in '{}' are not used: ", file_.string()), aside().string(),
                              "Run `ditattn tune` again."});
    EXPECT_FALSE(fs::exists(file_));
    EXPECT_TRUE(fs::exists(aside()));
    fs::remove_all(aside());
  }

  testing::TemporaryFolder folder_;
  fs::path file_ = folder_.path() / "tuned.json";
};

TEST_F(TuneCache, EverythingComesBack) {
  TunedProblem odd{.problem = {},
                   .results = {{"A", "", "", 1e-6, std::numeric_limits<double>::quiet_NaN(), ""},
                               {"B", "", "", 1e300, std::numeric_limits<double>::infinity(), ""}}};
  TunedProblem empty{.problem = {.mask = MaskKind::additive}, .results = {}};
  publish_tuned(file_, kHere, {sample_problem(), odd, empty});
  const LogRecorder log;
  const std::vector<TunedProblem> read = read_tune_cache(file_, kHere, false);
  EXPECT_TRUE(log.entries.empty());
  ASSERT_EQ(read.size(), 3U);
  expect_same(sample_problem(), read[0]);
  expect_same(odd, read[1]);
  expect_same(empty, read[2]);
}

TEST_F(TuneCache, EachFieldOfAProblemMakesAnother) {
  const Problem base;
  const std::vector<Problem> others{
      {.batch = 2},     {.num_heads = 2}, {.num_kv_heads = 2}, {.seq_q = 2},
      {.seq_kv = 2},    {.head_size = 2}, {.dtype = kFloat16}, {.mask = MaskKind::boolean},
      {.causal = true}, {.packed = true}, {.joint = true},     {.spans = true},
      {.fp8_kv = true}, {.alignment = 8}};
  for (const Problem& other : others) publish_tuned(file_, kHere, {{other, {}}});
  publish_tuned(file_, kHere, {{base, {}}});
  EXPECT_EQ(read_tune_cache(file_, kHere, false).size(), others.size() + 1);
  publish_tuned(file_, kHere, {{{.lse = true}, {{"A", "", "", 1, 1, ""}}}});  // the same but for the LSE: replaced
  const auto read = read_tune_cache(file_, kHere, false);
  ASSERT_EQ(read.size(), others.size() + 1);
  EXPECT_EQ(read.back().results.size(), 1U);
}

TEST_F(TuneCache, AMeasurementOfSomeKeepsTheOthers) {
  publish_tuned(file_, kHere, {sample_problem(), {.problem = {}, .results = {{"FLASH_ATTN", "", "", 7, 0, ""}}}});
  TunedProblem some = sample_problem();
  some.results = {{"CUSTOM", "x.Z", "e", 1.0, 0.5, ""}, {"SAGE_ATTN", "a.b.Other", "", 0, 0, "refuses now"}};
  publish_tuned(file_, kHere, {some}, Others::kept);
  std::vector<TunedProblem> read = read_tune_cache(file_, kHere, false);
  ASSERT_EQ(read.size(), 2U);
  expect_same(read[0], {.problem = {}, .results = {{"FLASH_ATTN", "", "", 7, 0, ""}}});
  const TunedResult flash = sample_problem().results[0];
  expect_same(read[1], {.problem = some.problem, .results = {some.results[0], flash, some.results[1]}});
  publish_tuned(file_, kHere, {some}, Others::dropped);
  expect_same(read_tune_cache(file_, kHere, false).at(1), some);
}

TEST_F(TuneCache, TextsThatAreNoUtf8AreMended) {
  TunedProblem damaged = sample_problem();
  damaged.results[0].reason = "broken \xff\xfe text\xc3";
  damaged.results[1].engine = std::string("\x80", 1);
  publish_tuned(file_, kHere, {damaged});
  const LogRecorder log;
  const auto read = read_tune_cache(file_, kHere, false);
  EXPECT_TRUE(log.entries.empty());
  ASSERT_EQ(read.size(), 1U);
  EXPECT_EQ(read[0].results[0].reason, "broken \xEF\xBF\xBD\xEF\xBF\xBD text\xEF\xBF\xBD");
  EXPECT_EQ(read[0].results[1].engine, "\xEF\xBF\xBD");
}

TEST_F(TuneCache, AMissingFileIsNothing) {
  const LogRecorder log;
  EXPECT_TRUE(read_tune_cache(file_, kHere, false).empty());
  EXPECT_TRUE(read_tune_cache({}, kHere, false).empty());
  EXPECT_TRUE(read_tune_cache(folder_.path() / "no" / "such" / "file", kHere, false).empty());
  EXPECT_TRUE(log.entries.empty());
}

TEST_F(TuneCache, CutAtAnyPlaceItIsSetAside) {
  publish_tuned(file_, kHere, {sample_problem()});
  const std::string whole = content();
  const std::size_t end = whole.find_last_of('}');
  for (std::size_t size = 0; size <= end; size += size < 64 ? 1 : 7) {
    write(whole.substr(0, size));
    expect_set_aside({});
  }
}

// Whatever bytes change, nothing is thrown, and what is believed is within its bounds.
TEST_F(TuneCache, RandomDamageIsToldOrHarmless) {
  publish_tuned(file_, kHere, {sample_problem()});
  const std::string whole = content();
  std::mt19937 random(20260101);
  int told = 0;
  constexpr int rounds = 2000;
  for (int i = 0; i < rounds; ++i) {
    std::string damaged = whole;
    for (unsigned changes = random() % 4 + 1; changes > 0; --changes) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    write(damaged);
    const LogRecorder log;
    for (const TunedProblem& read : read_tune_cache(file_, kHere, false)) {
      EXPECT_GE(std::min({read.problem.batch, read.problem.seq_q, read.problem.alignment}), 0);
      EXPECT_GE(read.problem.num_kv_heads, 1);
      for (const TunedResult& result : read.results) {
        EXPECT_TRUE(result.median_ms >= 0 && !(result.error < 0)) << damaged;
      }
    }
    EXPECT_EQ(log.entries.size(), fs::exists(file_) ? 0U : 1U) << damaged;
    told += static_cast<int>(log.entries.size());
  }
  std::cout << told << " of " << rounds << " damaged files were set aside\n";
  EXPECT_GT(told, rounds / 4);
}

TEST_F(TuneCache, ValuesOfWrongTypesAndSizesAreSetAside) {
  publish_tuned(file_, kHere, {sample_problem()});
  const Json good = Json::parse(content());
  const std::vector<Json> wrong_numbers{"7",          -1, 1e30, 2.5, true, nullptr, Json::array(), Json::object(),
                                        3'000'000'000};
  const Json::json_pointer problem("/problems/0/problem");
  const Json::json_pointer result("/problems/0/results/0");
  const auto expect_wrong = [&](const Json::json_pointer& where, const Json& value) {
    Json bad = good;
    bad[where] = value;
    write(bad.dump());
    SCOPED_TRACE(fmt::format("{} = {}", where.to_string(), value.dump()));
    expect_set_aside({});
  };
  for (const char* size : {"batch", "num_heads", "num_kv_heads", "seq_q", "seq_kv", "head_size", "alignment"}) {
    for (const Json& value : wrong_numbers) expect_wrong(problem / size, value);
  }
  expect_wrong(problem / "num_kv_heads", 0);
  for (const char* flag : {"causal", "packed", "joint", "spans", "fp8_kv"}) {
    for (const Json& value : {Json(1), Json("true"), Json(nullptr)}) expect_wrong(problem / flag, value);
  }
  for (const Json& value : {Json("float99"), Json("none of them"), Json(""), Json(3), Json(nullptr)}) {
    expect_wrong(problem / "dtype", value);
    expect_wrong(problem / "mask", value);
  }
  for (const Json& value : {Json("1"), Json(-1e-9), Json(true), Json(Json::array())}) {
    expect_wrong(result / "median_ms", value);
    expect_wrong(result / "error", value);
  }
  for (const char* text : {"backend", "class_path", "engine", "reason"}) {
    for (const Json& value : {Json(1), Json(nullptr), Json(Json::object())}) expect_wrong(result / text, value);
  }
  for (const char* key : {"format", "version", "environment", "problems"}) {
    for (const Json& value : {Json(nullptr), Json("x"), Json(7), Json(true), Json(Json::object({{"a", 1}}))}) {
      expect_wrong(Json::json_pointer() / key, value);
    }
    Json bad = good;
    bad.erase(key);
    write(bad.dump());
    expect_set_aside({key});
  }
  for (const char* numbers : {"1e999", "NaN", "-Infinity"}) {
    std::string text = content().empty() ? good.dump() : content();
    text.replace(text.find("1.25"), 4, numbers);
    write(text);
    expect_set_aside({});
  }
}

TEST_F(TuneCache, OddFilesAreSetAside) {
  for (const std::string& text :
       {std::string("null"), std::string("[]"), std::string("\0\0\0", 3), std::string(1'000'000, '['),
        std::string("{\"format\": ") + std::string(200'000, '[') + std::string(200'000, ']') + "}"}) {
    write(text);
    expect_set_aside({});
  }
  write("{}");
  fs::resize_file(file_, std::uintmax_t{65} << 20);  // sparse
  expect_set_aside({"it has 68157440 bytes, 67108864 at most"});
  fs::create_directory(file_);
  std::ofstream(file_ / "inside") << "x";
  expect_set_aside({});
}

TEST_F(TuneCache, OtherFormatsVersionsAndMachinesAreSetAside) {
  publish_tuned(file_, kHere, {sample_problem()});
  const Json good = Json::parse(content());
  const auto expect_told = [&](const char* where, const Json& value, const std::string& text) {
    Json bad = good;
    bad[Json::json_pointer(where)] = value;
    write(bad.dump());
    expect_set_aside({text});
  };
  expect_told("/version", 0,
              R"(it is of the format "ditattn tuned choices", version 0, not "ditattn tuned choices", version 1)");
  expect_told("/version", 2, "version 2, not");
  expect_told("/format", "somebody else's", R"(it is of the format "somebody else's", version 1)");
  expect_told("/environment/name", "Other CPU", "it was made for name 'Other CPU', here 'Test CPU'");
  expect_told("/environment/threads", "64", "it was made for threads '64', here '2'");
  expect_told("/environment/more", "x", "it was made for things that this version does not know");
  Json bad = good;
  bad["environment"].erase("threads");
  write(bad.dump());
  expect_set_aside({"it was made for threads '', here '2'"});
}

TEST_F(TuneCache, FrozenLeavesTheFileWhereItIs) {
  write("not JSON");
  const LogRecorder log;
  EXPECT_TRUE(read_tune_cache(file_, kHere, true).empty());
  EXPECT_EQ(content(), "not JSON");
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"tuned.json"});
  ASSERT_EQ(log.entries.size(), 1U);
  testing::expect_contains(log.entries[0].second, {"are not used: "});
}

TEST_F(TuneCache, WhatIsSetAsideMakesRoom) {
  for (const char* damage : {"first damage", "second damage"}) {
    write(damage);
    const LogRecorder log;
    publish_tuned(file_, kHere, {sample_problem()});
    EXPECT_EQ(log.entries.size(), 1U);
    EXPECT_EQ(read_tune_cache(file_, kHere, false).size(), 1U);
    std::string kept;
    std::getline(std::ifstream(aside()), kept);
    EXPECT_EQ(kept, damage);
  }
  // Where its place is taken by what cannot be replaced, the message says so by what it leaves out.
  fs::remove(aside());
  fs::create_directories(aside() / "taken");
  write("third damage");
  const LogRecorder log;
  EXPECT_TRUE(read_tune_cache(file_, kHere, false).empty());
  ASSERT_EQ(log.entries.size(), 1U);
  EXPECT_EQ(log.entries[0].second.find("it is now"), std::string::npos);
  publish_tuned(file_, kHere, {sample_problem()});
  EXPECT_EQ(read_tune_cache(file_, kHere, false).size(), 1U);
}

TEST_F(TuneCache, AFileThatCannotBeReadIsTold) {
  write("{}");
  fs::permissions(file_, fs::perms::none);
  fs::permissions(folder_.path(), fs::perms{0755});
  const int status = testing::status_in_child([&] {
    if (::geteuid() == 0 && ::seteuid(65534) != 0) return 77;
    const LogRecorder log;
    const bool is_empty = read_tune_cache(file_, kHere, false).empty();
    return is_empty && log.of(LogLevel::warning).size() == 1 ? 0 : 1;
  });
  if (status == 77) GTEST_SKIP() << "privileges cannot be dropped here";
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace ditattn
