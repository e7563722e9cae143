#include "tests/faults/load_problems.hpp"

#include <fmt/format.h>

#include <cmath>
#include <stdexcept>

#include "backends/reference/reference.hpp"

namespace ditattn::faults {
namespace {

constexpr std::uint64_t kFirstSeed = 31'000;

bool is_exact(const std::string& name) { return name == "FLASH_ATTN" || name == "SDPA"; }

// Against the oracle: throws where a result is farther off than the conformance tests allow.
void check(const conformance::Drawn& drawn, const AttentionBackend& backend) {
  const auto impl = backend.make(drawn.config);
  const Tensor lse = empty({drawn.query.size(0), drawn.config.num_heads, drawn.rows}, kFloat32);
  const Tensor out = impl->forward(drawn.query, drawn.key, drawn.value, drawn.metadata, {.lse = lse});
  const auto expected = reference::attention(drawn.query, drawn.key, drawn.value, drawn.metadata, impl->softmax_scale(),
                                             drawn.config.causal, backend.capabilities().causal_alignment);
  const conformance::Errors errors = conformance::errors_of(out, lse, expected);
  const double bound = conformance::bound_for(drawn, out, impl->softmax_scale());
  if (errors.out <= bound && errors.lse <= 1e-5) return;
  throw std::runtime_error(fmt::format("{} alone is wrong by {:.1e} (bound {:.1e}), its LSE by {:.1e}, in {}",
                                       backend.get_name(), errors.out, bound, errors.lse, drawn.text));
}

// What a class gives alone; none where it refuses.
std::optional<Result> alone(const conformance::Drawn& drawn, const AttentionBackend& backend) {
  try {
    const auto impl = backend.make(drawn.config);
    return result_of(drawn, true, [&](const ForwardOutputs& outputs) {
      return impl->forward(drawn.query, drawn.key, drawn.value, drawn.metadata, outputs);
    });
  } catch (const ValueError&) {
    return std::nullopt;
  }
}

}  // namespace

std::vector<LoadProblem> load_problems(int count, const std::vector<std::string>& class_paths) {
  const Capabilities all = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class()->capabilities();
  std::vector<LoadProblem> problems;
  for (int i = 0; i < count; ++i) {
    LoadProblem problem{
        .drawn = conformance::draw_problem(kFirstSeed + static_cast<std::uint64_t>(i), all,
                                           {.queries = 70, .keys = 90, .joint_queries = 20, .joint_keys = 30}),
        .alone = {}};
    for (const std::string& path : class_paths) {
      const BackendClass backend = resolve_class_path(path);
      if (auto result = alone(problem.drawn, *backend)) {
        problem.alone.emplace(path, std::move(*result));
        if (is_exact(backend->get_name())) check(problem.drawn, *backend);
      }
    }
    problems.push_back(std::move(problem));
  }
  return problems;
}

}  // namespace ditattn::faults
