#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "ditattn/backend.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/registry.hpp"
#include "registry/check_call.hpp"
#include "registry/observer.hpp"
#include "registry/repeated_calls.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

thread_local const BackendAccess::CheckedProblem* last_checked = nullptr;

// A backend that takes `problem`, to name in the refusal of another. Looks at what can be imported; empty if none.
std::string other_backend_for(const Problem& problem, const AttentionBackend& refusing) {
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    try {
      const BackendClass backend = member.get_class();
      if (backend.get() == &refusing || !backend->explain(problem)) continue;
      backend->validate_available();
      return member.name();
    } catch (const Error&) {
      continue;  // unavailable here: not a candidate
    }
  }
  return {};
}

[[noreturn]] void refuse(const Verdict& verdict, const Problem& problem, const AttentionBackend& backend) {
  const std::string other = other_backend_for(problem, backend);
  throw ValueError(other.empty() ? verdict.text() : fmt::format("{} {} would do.", verdict.text(), other));
}

// The problem of a call that nothing is wrong with and the class takes.
Problem checked_problem(const AttentionImpl& impl, const Tensor& query, const Tensor& key, const Tensor& value,
                        const AttentionMetadata& metadata, const ForwardOutputs& outputs) {
  Problem problem = check_call(impl, query, key, value, metadata);
  problem.lse = outputs.lse.defined();
  if (outputs.out.defined()) problem.alignment = std::min(problem.alignment, alignment_of(outputs.out));
  check_outputs(outputs, problem, query, key, value, metadata);
  if (const Verdict verdict = impl.backend().explain(problem); !verdict) refuse(verdict, problem, impl.backend());
  return problem;
}

// The first implementation that an observer has for this call, else the event's own.
const AttentionImpl& chosen_by(const ForwardObservers& observers, const ForwardEvent& event) {
  for (const auto& observer : observers) {
    if (const AttentionImpl* other = observer->instead(event)) return *other;
  }
  return event.impl;
}

// `run`, with those told who observe calls.
void run_observed(const AttentionImpl& impl, const Problem& problem, const AttentionCall& call) {
  const auto observers = forward_observers();
  if (!observers) return run_counted(impl, call);  // nobody any more
  ForwardEvent event{.impl = impl, .problem = problem, .call = call};
  for (const auto& observer : *observers) observer->before(event);
  const AttentionImpl& chosen = chosen_by(*observers, event);
  BackendAccess::last_launched() = &chosen;
  run_counted(chosen, call);
  event.computed = BackendAccess::last_launched();  // another than `chosen` where that passes calls on
  for (const auto& observer : *observers) observer->after(event);
}

}  // namespace

const AttentionImpl*& BackendAccess::last_launched() {
  thread_local const AttentionImpl* last = nullptr;
  return last;
}

BackendAccess::CheckedProblem::CheckedProblem(const AttentionImpl& impl, const Problem& problem)
    : impl_(impl), problem_(problem), before_(std::exchange(last_checked, this)) {}

BackendAccess::CheckedProblem::~CheckedProblem() { last_checked = before_; }

const Problem* BackendAccess::CheckedProblem::of(const AttentionImpl& impl) {
  return last_checked != nullptr && &last_checked->impl_ == &impl ? &last_checked->problem_ : nullptr;
}

AttentionImpl::AttentionImpl(ImplConfig config)
    : config_(std::move(config)),
      scale_(config_.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(config_.head_size)))) {}

AttentionImpl::~AttentionImpl() = default;

Tensor AttentionImpl::forward(const Tensor& query, const Tensor& key, const Tensor& value,
                              const AttentionMetadata& metadata, const ForwardOutputs& outputs) const {
  const bool is_plain = !metadata.defined() && !outputs.lse.defined();
  const PlainCall plain{.impl = *this, .query = query, .key = key, .value = value, .out = outputs.out};
  const Problem* known = is_plain ? repeated_calls().find(plain) : nullptr;
  const Problem problem = known != nullptr ? *known : checked_problem(*this, query, key, value, metadata, outputs);
  if (is_plain && known == nullptr) repeated_calls().add(plain, problem);
  Tensor out = outputs.out;
  if (!out.defined()) {
    out = empty(std::array{problem.batch, problem.seq_q, problem.num_heads, problem.head_size}, query.dtype(),
                query.device());
  }
  if (out.numel() > 0) {
    const AttentionCall call{
        .query = query, .key = key, .value = value, .out = out, .lse = outputs.lse, .metadata = metadata};
    const BackendAccess::CheckedProblem checked(*this, problem);
    if (forwards_are_observed.load(std::memory_order_acquire)) {
      run_observed(*this, problem, call);
    } else {
      run_counted(*this, call);
    }
  }
  return out;
}

}  // namespace ditattn
