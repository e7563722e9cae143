#include "guard/layers.hpp"

#include <fmt/format.h>
#include <fnmatch.h>

#include <algorithm>
#include <functional>
#include <limits>

namespace ditattn {
namespace {

double badness(const GuardFinding& finding) {
  return finding.error / std::max(finding.bound, std::numeric_limits<double>::min());
}

bool matches(const std::vector<std::string>& patterns, const std::string& name) {
  return patterns.empty() || std::ranges::any_of(patterns, [&](const std::string& pattern) {
           return ::fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
         });
}

bool is_for(const AttentionImpl& impl, const AttentionBackend& backend, const AttentionImpl& like) {
  return &impl.backend() == &backend && impl.config().num_heads == like.config().num_heads &&
         impl.num_kv_heads() == like.num_kv_heads() && impl.config().head_size == like.config().head_size &&
         impl.config().causal == like.config().causal && impl.softmax_scale() == like.softmax_scale();
}

}  // namespace

bool WatchedLayer::add(const GuardFinding& finding) {
  const std::lock_guard lock(mutex_);
  const bool is_worst = seen_.checks == 0 || badness(finding) > badness(seen_.worst);
  ++seen_.checks;
  seen_.backend = finding.backend;
  seen_.last_error = finding.error;
  seen_.non_finite += static_cast<std::uint64_t>(finding.non_finite);
  if (is_worst) seen_.worst = finding;
  return finding.failed() && ++seen_.failures == 1;
}

void WatchedLayer::add_not_checked(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  ++seen_.not_checked;
  seen_.reason = reason;
}

GuardedLayer WatchedLayer::report() const {
  const std::lock_guard lock(mutex_);
  GuardedLayer report = seen_;
  report.layer = name;
  report.role = role;
  report.calls = calls.load(std::memory_order_relaxed);
  report.captured = captured.load(std::memory_order_relaxed);
  return report;
}

void WatchedLayer::set_replaced(const std::string& backend, std::uint64_t call) {
  const std::lock_guard lock(mutex_);
  if (seen_.replaced_by == backend) return;
  seen_.replaced_by = backend;
  seen_.replaced_at = call;
}

const AttentionImpl* WatchedLayer::known_replacement(const AttentionBackend& backend, const AttentionImpl& like) const {
  const auto found =
      std::ranges::find_if(replacements_, [&](const auto& kept) { return is_for(*kept, backend, like); });
  return found == replacements_.end() ? nullptr : found->get();
}

const AttentionImpl& WatchedLayer::replacement(const BackendClass& backend, const AttentionImpl& like) {
  {
    const std::lock_guard lock(mutex_);
    if (const AttentionImpl* known = known_replacement(*backend, like)) return *known;
  }
  ImplConfig config = like.config();
  config.backend_kwargs = {};                                   // another back end's
  std::unique_ptr<AttentionImpl> made = backend->make(config);  // no lock is held: it may call Python
  const std::lock_guard lock(mutex_);
  if (const AttentionImpl* known = known_replacement(*backend, like)) return *known;
  return *replacements_.emplace_back(std::move(made));
}

template <class String>
std::size_t WatchedLayers::Hash::operator()(const Key<String>& key) const {
  const std::hash<std::string_view> hash;
  return hash(key.layer) * 31 + hash(key.role) * 7 + hash(key.backend) +
         static_cast<std::size_t>(key.num_heads * 1'000'003 + key.num_kv_heads * 10'007 + key.head_size);
}

template <class A, class B>
bool WatchedLayers::Equal::operator()(const Key<A>& a, const Key<B>& b) const {
  return a.layer == b.layer && a.role == b.role && a.backend == b.backend && a.num_heads == b.num_heads &&
         a.num_kv_heads == b.num_kv_heads && a.head_size == b.head_size;
}

WatchedLayer& WatchedLayers::of(const AttentionImpl& impl) {
  const ImplConfig& config = impl.config();
  Asked key{.layer = config.prefix, .role = config.role, .backend = {}};
  std::string backend;
  if (config.prefix.empty() && config.role.empty()) {
    backend = impl.backend().get_name();
    key = {.layer = {},
           .role = {},
           .backend = backend,
           .num_heads = config.num_heads,
           .num_kv_heads = impl.num_kv_heads(),
           .head_size = config.head_size};
  }
  {
    const std::shared_lock lock(mutex_);
    if (const auto found = layers_.find(key); found != layers_.end()) return *found->second;
  }
  return make(key, config);
}

WatchedLayer& WatchedLayers::make(const Asked& key, const ImplConfig& config) {
  const std::unique_lock lock(mutex_);
  if (const auto found = layers_.find(key); found != layers_.end()) return *found->second;
  std::shared_ptr<Detour> detour;
  if (options_.scope == GuardScope::role) {
    std::shared_ptr<Detour>& of_role = detours_[config.role];
    if (!of_role) of_role = std::make_shared<Detour>(options_.safer);
    detour = of_role;
  } else {
    detour = std::make_shared<Detour>(options_.safer);
  }
  std::string name = config.prefix;
  if (!key.backend.empty()) {
    name = fmt::format("{} {}×{}", key.backend, key.num_heads, key.head_size);
    if (key.num_kv_heads != key.num_heads) name += fmt::format(", {} K/V heads", key.num_kv_heads);
  }
  const bool is_watched = matches(options_.layers, config.prefix) && matches(options_.roles, config.role);
  Known known{.layer = std::string(key.layer),
              .role = std::string(key.role),
              .backend = std::string(key.backend),
              .num_heads = key.num_heads,
              .num_kv_heads = key.num_kv_heads,
              .head_size = key.head_size};
  auto made = std::make_unique<WatchedLayer>(std::move(name), config.role, is_watched, std::move(detour));
  return *layers_.emplace(std::move(known), std::move(made)).first->second;
}

std::vector<GuardedLayer> WatchedLayers::report() const {
  std::vector<GuardedLayer> report;
  {
    const std::shared_lock lock(mutex_);
    for (const auto& [key, layer] : layers_) {
      if (layer->is_watched) report.push_back(layer->report());
    }
  }
  std::ranges::sort(report, [](const GuardedLayer& a, const GuardedLayer& b) {
    const double of_a = badness(a.worst);
    const double of_b = badness(b.worst);
    return of_a != of_b ? of_a > of_b : std::tie(a.layer, a.role) < std::tie(b.layer, b.role);
  });
  return report;
}

}  // namespace ditattn
