#include <fmt/format.h>

#include "core/cuda_driver.hpp"
#include "ditattn/log.hpp"
#include "ditattn/parallel.hpp"
#include "parallel/error_text.hpp"
#include "parallel/parallel_call.hpp"
#include "parallel/ulysses_call.hpp"

namespace ditattn::parallel {

struct ParallelAttention::Layer : LayerState {
  using LayerState::LayerState;
};

namespace {

// The same on all ranks.
Cut cut_of(LayerState& layer, const GroupState& group, const Agreement& agreement) {
  if (group.cut) return *group.cut;
  const std::int64_t most_heads = layer.heads().places[0].query.size();
  return cut_that_pays(most_heads, agreement.sizes.batch, agreement.sizes.total_rows(), agreement.multiprocessors);
}

}  // namespace

ParallelAttention::ParallelAttention(const BackendClass& backend, const ImplConfig& config,
                                     std::shared_ptr<ParallelGroup> group)
    : layer_(std::make_unique<Layer>(backend, config, std::move(group))) {
  const GroupState& state = GroupAccess::state(*layer_->group);
  const int ulysses = state.mesh.ulysses;
  if (ulysses > config.num_heads && state.all->rank() == 0) {
    log(LogLevel::warning,
        fmt::format(
            "ulysses={} shares out {} heads: {} of {} ranks have none and only pass tokens on. A larger ring or "
            "allgather degree, and ulysses of at most {}, lets all compute.",
            ulysses, config.num_heads, (ulysses - config.num_heads) * state.mesh.second(), state.all->size(),
            config.num_heads));
  }
}

ParallelAttention::~ParallelAttention() = default;

Tensor ParallelAttention::forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const AttentionMetadata& metadata, const ForwardOutputs& outputs) {
  GroupState& group = GroupAccess::state(*layer_->group);
  const bool is_captured = query.defined() && cuda::is_captured(query.device());
  if (group.all->size() == 1) return layer_->whole->forward(query, key, value, metadata, outputs);
  const Agreement agreement = agree(*group.all, group.agreements, *layer_->whole, query, key, value, metadata, outputs,
                                    group.mesh.second() > 1);
  if (is_captured && !outputs.out.defined()) {
    throw NotImplementedError("A call over several ranks that is captured into a graph needs `out`.");
  }
  try {
    ForwardOutputs results = outputs;
    if (!results.out.defined()) {
      const std::int64_t rows = query.size(1) + agreement.sizes.joint_rows;
      results.out = empty(std::array{query.size(0), rows, query.size(2), query.size(3)}, query.dtype(), query.device());
    }
    if (group.mesh.second() == 1) {
      const CutHeads& heads = layer_->heads(cut_of(*layer_, group, agreement));
      UlyssesCall(*layer_, heads, group, agreement, metadata).run(query, key, value, results);
    } else {
      ParallelCall(*layer_, group, agreement, metadata).run(query, key, value, results);
    }
    return results.out;
  } catch (...) {                                                              // the others wait for this rank
    if (!is_captured) group.all->abort(error_text(std::current_exception()));  // else nothing was begun
    throw;
  }
}

void ParallelAttention::refuse(const std::string& reason, DLDevice device) noexcept {
  Communicator& all = *GroupAccess::state(*layer_->group).all;
  if (all.size() == 1) return;
  if (device.device_type != kDLCPU) return all.abort(reason);
  try {
    parallel::refuse(all, reason.empty() ? "no reason was given" : reason);
  } catch (const std::exception& error) {
    log(LogLevel::warning, fmt::format("parallel: the other ranks could not be told of an error: {}", error.what()));
  }
}

}  // namespace ditattn::parallel
