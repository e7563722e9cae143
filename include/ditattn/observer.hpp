#pragma once

/// Sees every attention call of the process, whatever its back end: to count, to record, to check.
///
///     class Counter final : public ForwardObserver {
///      public:
///       void before(const ForwardEvent& event) override {
///         if (event.impl.config().role == "cross") ++calls;
///       }
///       std::atomic<int> calls{0};
///     };
///
///     auto counter = std::make_shared<Counter>();
///     ForwardObservation observation(counter);  // until the end of the scope
///     run_the_model();

#include <memory>

#include "ditattn/backend.hpp"
#include "ditattn/export.hpp"

namespace ditattn {

/// One call of `AttentionImpl::forward`. Valid while an observer is told of it; its tensors may be kept, but their
/// memory is the caller's.
struct ForwardEvent {
  const AttentionImpl& impl;  ///< its config has the layer's name (`prefix`) and `role`
  const Problem& problem;     ///< sizes, dtype, device and kind of mask
  const AttentionCall& call;  ///< tensors and metadata
  /// After the call: what computed, also behind a platform's default or by `instead`. Null before.
  const AttentionImpl* computed = nullptr;
};

/// Told of calls by the threads that make them, also at the same time. What it throws, the caller of `forward` gets.
/// It may call `forward` itself, and is told of that call too. Nobody is told of calls that are refused, or that have
/// no rows to compute.
class DITATTN_API ForwardObserver {
 public:
  virtual ~ForwardObserver();

  /// Everything is checked, nothing is computed yet.
  virtual void before(const ForwardEvent& /*event*/) {}
  /// Another implementation for this call, null for none; asked when all have been told `before`, and the first answer
  /// counts. It must take the problem, align causality as `event.impl` does where that matters, write `out` and the
  /// LSE, and live until the call has ended.
  virtual const AttentionImpl* instead(const ForwardEvent& /*event*/) { return nullptr; }
  /// Computed; on a GPU: queued in this thread's stream. Not told where the back end, or an observer, threw.
  virtual void after(const ForwardEvent& /*event*/) {}
};

/// Lets an observer see all calls while this object lives; they are told in the order in which they came. Calls that
/// run in other threads when it ends may still tell the observer, which they keep alive.
class DITATTN_API ForwardObservation {
 public:
  /// From now on.
  explicit ForwardObservation(std::shared_ptr<ForwardObserver> observer);
  ~ForwardObservation();
  ForwardObservation(const ForwardObservation&) = delete;
  ForwardObservation& operator=(const ForwardObservation&) = delete;

 private:
  std::shared_ptr<ForwardObserver> observer_;
};

}  // namespace ditattn
