#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ditattn/guard.hpp"
#include "guard/detour.hpp"

namespace ditattn {

/// What a guard keeps of one layer. Thread-safe.
class WatchedLayer {
 public:
  WatchedLayer(std::string its_name, std::string its_role, bool watched, std::shared_ptr<Detour> way)
      : name(std::move(its_name)), role(std::move(its_role)), is_watched(watched), detour(std::move(way)) {}

  const std::string name;
  const std::string role;
  const bool is_watched;
  const std::shared_ptr<Detour> detour;  ///< its own, or its role's
  std::atomic<std::uint64_t> calls = 0;
  std::atomic<std::uint64_t> captured = 0;

  /// Adds a check to the report; true for the first that failed.
  bool add(const GuardFinding& finding);
  void add_not_checked(const std::string& reason);
  [[nodiscard]] GuardedLayer report() const;

  /// From which call on a back end (its name; empty: none any more) replaces the layer's own.
  void set_replaced(const std::string& backend, std::uint64_t call);

  /// `backend`'s implementation of a layer that is configured as `like`; built once, kept as long as this.
  const AttentionImpl& replacement(const BackendClass& backend, const AttentionImpl& like);

 private:
  [[nodiscard]] const AttentionImpl* known_replacement(const AttentionBackend& backend,
                                                       const AttentionImpl& like) const;

  mutable std::mutex mutex_;
  GuardedLayer seen_ = {};
  std::deque<std::unique_ptr<AttentionImpl>> replacements_;
};

/// The layers that a guard has met. They stay where they are. Thread-safe.
class WatchedLayers {
 public:
  explicit WatchedLayers(const GuardOptions& options) : options_(options) {}

  WatchedLayer& of(const AttentionImpl& impl);
  /// Worst first.
  [[nodiscard]] std::vector<GuardedLayer> report() const;

 private:
  /// Name and role; where a layer has neither, back end and sizes.
  template <class String>
  struct Key {
    String layer;
    String role;
    String backend;
    std::int64_t num_heads = 0;
    std::int64_t num_kv_heads = 0;
    std::int64_t head_size = 0;
  };
  using Known = Key<std::string>;
  using Asked = Key<std::string_view>;
  struct Hash {
    using is_transparent = void;
    template <class String>
    std::size_t operator()(const Key<String>& key) const;
  };
  struct Equal {
    using is_transparent = void;
    template <class A, class B>
    bool operator()(const Key<A>& a, const Key<B>& b) const;
  };

  WatchedLayer& make(const Asked& key, const ImplConfig& config);

  const GuardOptions& options_;
  mutable std::shared_mutex mutex_;
  std::unordered_map<Known, std::unique_ptr<WatchedLayer>, Hash, Equal> layers_;
  std::map<std::string, std::shared_ptr<Detour>> detours_;  // of roles
};

}  // namespace ditattn
