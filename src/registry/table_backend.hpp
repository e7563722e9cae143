#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>

#include <new>
#include <string>

#include "ditattn/backend.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {

/// Names of the functions a backend's table must have (docs/plugins.md says what each takes and returns).
inline constexpr const char* kTableFunctions[] = {"get_name", "capabilities", "validate_available",
                                                  "explain",  "known_kwargs", "create"};

/// A problem's yes-or-no features as one number (docs/plugins.md), as they cross the table.
inline std::int64_t problem_features(const Problem& p) {
  return p.causal | p.lse << 1 | p.packed << 2 | p.joint << 3 | p.spans << 4 | p.fp8_kv << 5;
}
inline void set_problem_features(Problem& p, std::int64_t features) {
  p.causal = (features & 1) != 0;
  p.lse = (features & 2) != 0;
  p.packed = (features & 4) != 0;
  p.joint = (features & 8) != 0;
  p.spans = (features & 16) != 0;
  p.fp8_kv = (features & 32) != 0;
}

/// Texts as they cross the table.
tvm::ffi::Array<tvm::ffi::String> to_array(const std::vector<std::string>& texts);

/// Capabilities as they cross the table, and back.
tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> capabilities_to_map(const Capabilities& can);
Capabilities capabilities_from_map(const tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>& map);

/// Reaches what only the library may call.
struct BackendAccess {
  static std::unique_ptr<AttentionImpl> create(const BackendClass& backend, const ImplConfig& config);
  static std::vector<std::string> known_kwargs(const AttentionBackend& backend) { return backend.known_kwargs(); }
  static const BackendClass& backend(const AttentionImpl& impl) { return impl.backend_; }
  static void count_launch(const AttentionImpl& impl) {
    if (impl.launches_ == nullptr) return;
    impl.launches_->fetch_add(1, std::memory_order_relaxed);
    last_launched() = &impl;
  }
  /// What this thread counted last: it may be gone.
  static const AttentionImpl*& last_launched();

  /// While it lives, the problem that this thread's `forward` of `impl` has made of its call, for a `run` that would
  /// make it again.
  class CheckedProblem {
   public:
    CheckedProblem(const AttentionImpl& impl, const Problem& problem);
    CheckedProblem(const CheckedProblem&) = delete;
    CheckedProblem& operator=(const CheckedProblem&) = delete;
    ~CheckedProblem();
    /// Null where `run` was not called by `forward`.
    static const Problem* of(const AttentionImpl& impl);

   private:
    const AttentionImpl& impl_;
    const Problem& problem_;
    const CheckedProblem* before_;
  };
};

/// `run`, counted.
inline void run_counted(const AttentionImpl& impl, const AttentionCall& call) {
  impl.run(call);
  BackendAccess::count_launch(impl);
}

/// Calls `function` and turns whatever it throws into a `ditattn::Error` of the same kind; things that are not
/// exceptions too.
template <class Function>
auto guard(const std::string& origin, Function&& function) {
  try {
    return function();
  } catch (const Error&) {
    throw;
  } catch (const tvm::ffi::Error& error) {
    rethrow(error);
  } catch (const std::bad_alloc&) {
    throw MemoryError(origin + ": there is no memory for it.");
  } catch (const std::exception& error) {
    throw Error("RuntimeError", origin + " threw: " + error.what());
  } catch (...) {
    throw Error("RuntimeError", origin + " threw something that is not a std::exception");
  }
}

}  // namespace ditattn
