#include <fmt/format.h>

#include "core/cuda_driver.hpp"
#include "ditattn/log.hpp"
#include "ditattn/parallel.hpp"
#include "parallel/error_text.hpp"
#include "parallel/parallel_call.hpp"
#include "registry/table_backend.hpp"

namespace ditattn::parallel {

struct ParallelAttention::Layer : LayerState {};

namespace {

// The layer's config for some of its heads.
std::unique_ptr<AttentionImpl> make_run(const BackendClass& backend, ImplConfig config, const HeadRun& run,
                                        bool causal) {
  config.num_heads = run.query.size();
  config.num_kv_heads = run.kv.size();
  config.causal = causal;
  return BackendAccess::create(backend, config);
}

}  // namespace

ParallelAttention::ParallelAttention(const BackendClass& backend, const ImplConfig& config,
                                     std::shared_ptr<ParallelGroup> group)
    : layer_(std::make_unique<Layer>()) {
  layer_->whole = backend->make(config);
  layer_->group = std::move(group);
  const GroupState& state = *layer_->group->state_;
  const int ulysses = state.mesh.ulysses;
  for (int place = 0; place < ulysses; ++place) {
    const Heads heads = heads_of(config.num_heads, layer_->whole->num_kv_heads(), ulysses, place);
    layer_->query_heads.push_back(heads.query);
    layer_->kv_heads.push_back(heads.kv);
    if (place == state.ulysses->rank()) layer_->heads = heads;
  }
  for (const HeadRun& run : layer_->heads.runs) {
    auto& impls = layer_->runs.emplace_back();
    impls[0] = make_run(backend, config, run, false);
    if (config.causal || backend->capabilities().causal) impls[1] = make_run(backend, config, run, true);
  }
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
  GroupState& group = *layer_->group->state_;
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
    ParallelCall(*layer_, group, agreement, metadata).run(query, key, value, results);
    return results.out;
  } catch (...) {                                                              // the others wait for this rank
    if (!is_captured) group.all->abort(error_text(std::current_exception()));  // else nothing was begun
    throw;
  }
}

void ParallelAttention::refuse(const std::string& reason, DLDevice device) noexcept {
  Communicator& all = *layer_->group->state_->all;
  if (all.size() == 1) return;
  if (device.device_type != kDLCPU) return all.abort(reason);
  try {
    parallel::refuse(all, reason.empty() ? "no reason was given" : reason);
  } catch (const std::exception& error) {
    log(LogLevel::warning, fmt::format("parallel: the other ranks could not be told of an error: {}", error.what()));
  }
}

}  // namespace ditattn::parallel
