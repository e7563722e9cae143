#include "parallel/layer_state.hpp"

#include <algorithm>
#include <utility>

#include "registry/table_backend.hpp"

namespace ditattn::parallel {
namespace {

// The layer's config for some of its heads.
std::unique_ptr<AttentionImpl> make_run(const BackendClass& backend, ImplConfig config, const HeadRun& run,
                                        bool causal) {
  config.num_heads = run.query.size();
  config.num_kv_heads = run.kv.size();
  config.causal = causal;
  return BackendAccess::create(backend, config);
}

std::vector<Range> of_part(const std::vector<Heads>& places, int part, Range HeadPart::*member) {
  std::vector<Range> ranges;
  ranges.reserve(places.size());
  for (const Heads& heads : places) ranges.push_back(heads.parts[static_cast<std::size_t>(part)].*member);
  return ranges;
}

}  // namespace

std::vector<Range> CutHeads::query_heads(int part) const { return of_part(places, part, &HeadPart::query); }
std::vector<Range> CutHeads::kv_heads(int part) const { return of_part(places, part, &HeadPart::kv); }

LayerState::LayerState(const BackendClass& backend, const ImplConfig& config,
                       std::shared_ptr<ParallelGroup> parallel_group)
    : group(std::move(parallel_group)), whole(backend->make(config)), backend_(backend) {
  heads();
}

const CutHeads& LayerState::heads(Cut cut) {
  const auto found = std::ranges::find(cuts_, cut, &decltype(cuts_)::value_type::first);
  if (found != cuts_.end()) return found->second;
  const GroupState& state = GroupAccess::state(*group);
  const ImplConfig& config = whole->config();
  CutHeads made;
  for (int place = 0; place < state.mesh.ulysses; ++place) {
    made.places.push_back(heads_of(config.num_heads, whole->num_kv_heads(), state.mesh.ulysses, place, cut));
  }
  made.mine = made.places[static_cast<std::size_t>(state.ulysses->rank())];
  for (const HeadRun& run : made.mine.runs) {
    auto& impls = made.runs.emplace_back();
    impls[0] = make_run(backend_, config, run, false);
    if (config.causal || backend_->capabilities().causal) impls[1] = make_run(backend_, config, run, true);
  }
  return cuts_.emplace_back(cut, std::move(made)).second;
}

}  // namespace ditattn::parallel
