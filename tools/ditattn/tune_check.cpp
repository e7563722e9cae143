#include "tools/ditattn/tune_check.hpp"

#include <memory>
#include <utility>
#include <vector>

#include "ditattn/attention.hpp"
#include "tuner/rounds.hpp"

namespace ditattn::cli {

std::optional<TuneCheck> check_choice(const Inputs& inputs, const ImplConfig& config, const TunedProblem& measured,
                                      std::optional<double> max_error, double budget_ms) {
  const Problem& problem = measured.problem;
  const double bound = max_error.value_or(exact_error(problem.dtype));
  const Tensor out = allocate_out(problem);
  Rounds rounds(problem.device);
  std::vector<std::size_t> entries;
  const auto add = [&](std::shared_ptr<const AttentionImpl> layer) {
    entries.push_back(rounds.add([&inputs, &out, layer = std::move(layer)] {
      layer->forward(inputs.query, inputs.key, inputs.value, inputs.metadata, {.out = out, .lse = {}});
    }));
  };
  AttentionOptions automatic{.softmax_scale = config.softmax_scale, .causal = config.causal, .max_error = max_error};
  add(attention_layer(automatic, {.num_heads = config.num_heads,
                                  .num_kv_heads = config.num_kv_heads.value_or(config.num_heads),
                                  .head_size = config.head_size,
                                  .device = std::string(device_type_name(problem.device))}));
  // Results are in order of time. Those over three times slower than the fastest cannot be the best, and may take
  // minutes.
  std::vector<std::string> names{"auto"};
  double fastest_ms = 0;
  for (const TunedResult& result : measured.results) {
    if (!result.reason.empty() || !(result.error <= bound)) continue;
    if (fastest_ms == 0) fastest_ms = result.median_ms;
    if (result.median_ms > 3 * fastest_ms) continue;
    add(DiffusionAttentionBackendEnum::from_name(result.backend).get_class()->make(config));
    names.push_back(result.backend);
  }
  if (names.size() == 1) return std::nullopt;
  rounds.run(entries, rounds.affordable(entries, budget_ms), [](std::size_t) { throw; });
  const std::size_t chosen = entries[0];
  const auto ratio_over = [&](std::size_t entry) { return rounds.median_ratio(chosen, entries[entry]); };
  std::size_t best = 1;
  for (std::size_t i = 2; i < entries.size(); ++i) {
    if (ratio_over(i) > ratio_over(best)) best = i;
  }
  return TuneCheck{.auto_ms = rounds.median_ms(chosen),
                   .best_ms = rounds.median_ms(entries[best]),
                   .ratio = ratio_over(best),
                   .best = names[best]};
}

}  // namespace ditattn::cli
