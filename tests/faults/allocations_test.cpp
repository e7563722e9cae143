// Every allocation of a piece of work fails once, and in a second round it and all after it. Each time there is an
// error that says so and nothing else; afterwards the same work gives the same answer.

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iostream>
#include <thread>

#include "ditattn/ditattn.hpp"
#include "tests/conformance/random_problem.hpp"
#include "tests/faults/failing_allocations.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"
#include "tuner/tune_cache.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using faults::Failing;
using faults::FailingAllocation;
namespace fs = std::filesystem;

// What came of work, as bytes that can be compared.
using Work = std::function<std::string()>;

constexpr int kMost = 20'000;  // allocations of any work here

struct Outcome {
  bool failed = false;  // an allocation did
  std::string answer;   // where nothing was thrown
  std::string wrong;    // an error of another kind
};

Outcome attempt(const Work& work, std::int64_t nth, Failing failing, std::size_t at_least) {
  Outcome outcome;
  bool thrown = false;
  {
    const FailingAllocation failing_allocation(nth, failing, at_least);
    try {
      outcome.answer = work();
    } catch (const std::bad_alloc&) {
      thrown = true;
    } catch (const MemoryError&) {
      thrown = true;
    } catch (const tvm::ffi::Error& error) {
      thrown = true;
      FailingAllocation::end();
      const std::string text = error.message();  // of a file: the system's reason
      if (text.find(std::strerror(ENOMEM)) == std::string::npos) outcome.wrong = error.kind() + ": " + text;
    } catch (const std::exception& error) {
      thrown = true;
      FailingAllocation::end();
      outcome.wrong = std::string("std::exception: ") + error.what();
    }
  }
  outcome.failed = FailingAllocation::has_failed();
  if (thrown && !outcome.failed) outcome.wrong = "thrown without need; " + outcome.wrong;
  if (thrown) outcome.answer.clear();
  return outcome;
}

// Runs `work` with each of its allocations failing. `work` may get by without one, then its answer must be right.
// Only allocations of `at_least` bytes count.
void expect_survives(const std::string& what, const Work& work, std::size_t at_least = 0) {
  const std::string expected = work();
  ASSERT_EQ(work(), expected) << what << ": the work itself is not repeatable";
  for (const Failing failing : {Failing::once, Failing::from_then_on}) {
    int errors = 0;
    int nth = 1;
    for (; nth < kMost; ++nth) {
      SCOPED_TRACE(what + ", allocation " + std::to_string(nth) +
                   (failing == Failing::once ? "" : " and all after it"));
      const Outcome outcome = attempt(work, nth, failing, at_least);
      ASSERT_EQ(outcome.wrong, "");
      errors += outcome.answer.empty() ? 1 : 0;
      if (!outcome.answer.empty()) {
        ASSERT_EQ(outcome.answer, expected);
      }
      ASSERT_EQ(work(), expected) << "afterwards";
      if (!outcome.failed) break;
    }
    ASSERT_LT(nth, kMost);
    std::cout << what << ": " << nth - 1 << " allocations, " << errors << " errors\n";
  }
}

std::string bytes_of(const Tensor& tensor) {
  return {static_cast<const char*>(data_pointer(tensor)),
          static_cast<std::size_t>(tensor.numel() * tensor.dtype().bits / 8)};
}

class Allocations : public testing::RegistryTest {
 protected:
  void SetUp() override { set_num_threads(3); }
  void TearDown() override {
    set_num_threads(0);
    RegistryTest::TearDown();
  }
};

class AllocationsOf : public Allocations, public ::testing::WithParamInterface<const char*> {};

// New metadata at each call, which reads masks, offsets and spans again.
Work forward_work(const AttentionImpl& impl, const conformance::Drawn& drawn, bool with_out) {
  const Tensor lse = empty({drawn.query.size(0), drawn.config.num_heads, drawn.rows}, kFloat32);
  Tensor out;
  if (with_out) {
    out = empty(std::array{drawn.query.size(0), drawn.rows, drawn.config.num_heads, drawn.config.head_size},
                drawn.query.dtype());
  }
  return [&impl, drawn, lse, out] {
    const AttentionMetadata fresh(drawn.metadata->fields);
    const Tensor result = impl.forward(drawn.query, drawn.key, drawn.value, fresh, {.out = out, .lse = lse});
    return bytes_of(result) + bytes_of(lse);
  };
}

TEST_P(AllocationsOf, Forward) {
  const BackendClass backend = Enum::from_name(GetParam()).get_class();
  int problems = 0;
  for (std::uint64_t seed = 500; problems < 12; ++seed) {
    const auto drawn = conformance::draw_problem(seed, backend->capabilities(),
                                                 {.queries = 70, .keys = 90, .joint_queries = 20, .joint_keys = 30});
    const auto impl = backend->make(drawn.config);
    const Work work = forward_work(*impl, drawn, problems % 2 == 0);
    try {
      work();
    } catch (const ValueError&) {
      continue;  // refused
    }
    expect_survives(drawn.text, work);
    if (HasFatalFailure()) return;
    ++problems;
  }
}

TEST_P(AllocationsOf, Refusal) {
  const auto impl = Enum::from_name(GetParam()).get_class()->make({.num_heads = 2, .head_size = 8});
  const Tensor query = testing::counting({1, 3, 2, 8});
  const Tensor key = testing::counting({1, 4, 1, 8});
  expect_survives("a problem that is refused", [&]() -> std::string {
    try {
      impl->forward(query, key, key);
    } catch (const ValueError& error) {
      return error.message();
    }
    return "not refused";
  });
}

// With a large problem all threads have work; a new thread has no scratch memory yet. Its thread-local data is made
// before: where there is no memory for that, glibc ends the process.
TEST_P(AllocationsOf, ForwardInANewThread) {
  const auto impl = Enum::from_name(GetParam()).get_class()->make({.num_heads = 4, .head_size = 64});
  conformance::Draw draw(7);
  const Tensor query = draw.normal({1, 300, 4, 64}, kFloat32);
  const Tensor small = draw.normal({1, 3, 4, 64}, kFloat32);
  const Tensor out = impl->forward(query, query, query);
  expect_survives("a new thread", [&] {
    std::string answer;
    std::exception_ptr error;
    std::thread([&] {
      try {
        {
          const faults::Exempt exempt;
          impl->forward(small, small, small);
        }
        answer = bytes_of(impl->forward(query, query, query, {}, {.out = out}));
      } catch (...) {
        error = std::current_exception();
      }
    }).join();
    if (error) std::rethrow_exception(error);
    return answer;
  });
}

INSTANTIATE_TEST_SUITE_P(, AllocationsOf, ::testing::Values("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"),
                         [](const auto& instance) { return std::string(instance.param); });

// Registrations change in between, so that nothing is kept: class, rules and layer are looked up anew.
TEST_F(Allocations, AttentionByNameAndByDefault) {
  conformance::Draw draw(8);
  const Tensor query = draw.normal({1, 20, 2, 16}, kFloat32);
  for (const std::string name : {"FLASH_ATTN", "SAGE_ATTN", "auto"}) {
    expect_survives("attention by " + name, [&] {
      Enum::CUSTOM.clear_override();
      return bytes_of(attention(query, query, query, {.backend = name}));
    });
  }
}

TEST_F(Allocations, RegisterLookUpAndList) {
  register_backend_class("faults.allocations.Toy", std::make_shared<testing::ToyBackend>());
  expect_survives("registration and look-up", [] {
    register_diffusion_backend(Enum::CUSTOM, "faults.allocations.Toy");
    std::string names = Enum::CUSTOM.get_class()->get_name() + Enum::CUSTOM.get_path();
    for (const Enum member : Enum::members()) names += member.name();
    Enum::CUSTOM.clear_override();
    return names + (Enum::CUSTOM.is_overridden() ? "overridden" : "");
  });
}

// nlohmann's documents allocate a little while they are destroyed, and end the process where they cannot. Of what reads
// them only large allocations fail here.
constexpr std::size_t kLarge = 1024;

TEST_F(Allocations, ConfigurationFromJson) {
  expect_survives(
      "a configuration",
      [] {
        const AttentionConfig config = AttentionConfig::from_json(
            R"({"default": {"backend": "FLASH_ATTN", "backend_kwargs": {"num_threads": 2}}, "per_role": {"self": "SAGE_ATTN", ")" +
            std::string(2 * kLarge, 'a') + R"(": {"b": "TORCH_SDPA"}}})");
        std::string text = config.default_spec->backend;
        for (const auto& [role, spec] : config.per_role) text += role + spec.backend;
        return text;
      },
      kLarge);
}

class AllocationsOfFiles : public Allocations {
 protected:
  AllocationsOfFiles() { fs::create_directories(folder_); }
  ~AllocationsOfFiles() override { fs::remove_all(folder_); }
  fs::path folder_ = fs::temp_directory_path() / ("ditattn_faults." + std::to_string(::getpid()));

  // Of names; temporary files of writers that failed would show.
  [[nodiscard]] std::string listing() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_)) names.push_back(entry.path().filename());
    std::ranges::sort(names);
    std::string text;
    for (const std::string& name : names) text += name + " ";
    return text;
  }
};

TEST_F(AllocationsOfFiles, Safetensors) {
  const fs::path file = folder_ / "x.safetensors";
  const SafetensorsFile content{.tensors = {{"query", testing::counting({20, 30})}, {"key", testing::counting({4})}},
                                .metadata = {{"a", "b"}}};
  save_safetensors(file, content);
  expect_survives(
      "reading safetensors",
      [&] {
        std::string text;
        for (const auto& [name, tensor] : load_safetensors(file).tensors) text += name + bytes_of(tensor);
        return text;
      },
      kLarge);
  expect_survives(
      "writing safetensors",
      [&] {
        save_safetensors(file, content);
        return std::string("written");
      },
      kLarge);
  EXPECT_EQ(listing(), "x.safetensors ");
}

TEST_F(AllocationsOfFiles, TunedChoices) {
  const fs::path file = folder_ / "tuned.json";
  const TunedFor environment{{"machine", "this one"}};
  const std::vector<TunedProblem> problems{
      {.problem = {.seq_q = 5, .seq_kv = 7},
       .results = {{.backend = "FLASH_ATTN", .class_path = "a.B", .engine = "e"}}}};
  publish_tuned(file, environment, problems);
  expect_survives(
      "reading tuned choices",
      [&] {
        const auto read = read_tune_cache(file, environment, false);
        if (read.empty()) throw std::bad_alloc();  // it was logged, and choices are made without
        return read.front().results.front().backend;
      },
      kLarge);
  expect_survives(
      "publishing tuned choices",
      [&] {
        publish_tuned(file, environment, problems);
        return std::string("published");
      },
      kLarge);
  EXPECT_EQ(listing(), "tuned.json tuned.json.lock ");
}

}  // namespace
}  // namespace ditattn
