#pragma once

/// Planted back ends behind the members, and a cache of tuned choices of the test's own.

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "ditattn/attention.hpp"
#include "ditattn/selector.hpp"
#include "tests/unit/planted_backend.hpp"
#include "tests/unit/tuner/tuner_fixture.hpp"
#include "tuner/random_call.hpp"

namespace ditattn::testing {

class PlantedTest : public TunerTest {
 protected:
  /// FLASH_ATTN and TORCH_SDPA, the order of the CPU, are right and take a millisecond; nobody else is available.
  void SetUp() override {
    TunerTest::SetUp();
    for (const auto member : DiffusionAttentionBackendEnum::members()) plant(member, {.is_unavailable = true});
    plant(DiffusionAttentionBackendEnum::FLASH_ATTN, right());
    plant(DiffusionAttentionBackendEnum::TORCH_SDPA, right());
  }

  static Plant right() { return {.delay = std::chrono::milliseconds(1)}; }

  void plant(DiffusionAttentionBackendEnum member, Plant what) {
    const auto backend = std::make_shared<PlantedBackend>(member.name(), std::move(what));
    planted_.insert_or_assign(member.name(), backend);
    use(member, backend);
  }
  [[nodiscard]] int calls(DiffusionAttentionBackendEnum member) const { return planted_.at(member.name())->calls(); }

  /// Which members compute while `body` runs, and how often.
  template <class Body>
  std::map<std::string, int> computing(const Body& body) const {
    std::map<std::string, int> counts;
    for (const auto& [name, backend] : planted_) counts[name] = -backend->calls();
    body();
    for (const auto& [name, backend] : planted_) counts[name] += backend->calls();
    std::erase_if(counts, [](const auto& entry) { return entry.second == 0; });
    return counts;
  }

  /// Who computes a problem without mask where nobody is named; with random tensors.
  std::string computes(const Problem& problem, const AttentionOptions& options = {}) const {
    const auto counts = computing([&] { forward(problem, options); });
    return counts.size() == 1 ? counts.begin()->first : "nobody, or several";
  }
  static Tensor forward(const Problem& problem, AttentionOptions options = {}) {
    NormalTensors normal(problem.seq_q, problem.dtype);
    const Tensor query = normal.next({problem.batch, problem.seq_q, problem.num_heads, problem.head_size});
    const Tensor key = normal.next({problem.batch, problem.seq_kv, problem.num_kv_heads, problem.head_size});
    const Tensor value = normal.next({problem.batch, problem.seq_kv, problem.num_kv_heads, problem.head_size});
    options.causal = problem.causal;
    return attention(query, key, value, options);
  }

  static TunedProblem quickly(const Problem& problem, TuneOptions options = {}) {
    options.budget_ms = 20;
    return tune(problem, options);
  }
  static const TunedResult& of(const TunedProblem& tuned, DiffusionAttentionBackendEnum member) {
    const auto found = std::ranges::find(tuned.results, member.name(), &TunedResult::backend);
    if (found == tuned.results.end()) throw ValueError(member.name() + " was not measured");
    return *found;
  }

 private:
  std::map<std::string, std::shared_ptr<PlantedBackend>> planted_;
};

/// Small, of the CPU, float32.
inline const Problem kSmall{.batch = 1, .num_heads = 2, .num_kv_heads = 2, .seq_q = 16, .seq_kv = 12, .head_size = 16};

}  // namespace ditattn::testing
