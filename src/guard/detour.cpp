#include "guard/detour.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "ditattn/errors.hpp"
#include "ditattn/selector.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;

// The rule of platforms' defaults: causality is never aligned otherwise on the way.
Verdict verdict_on(const AttentionBackend& backend, const ForwardEvent& event) {
  Verdict verdict = backend.explain(event.problem);
  const bool depends_on_alignment =
      event.problem.causal && (event.problem.seq_q != event.problem.seq_kv || event.problem.packed);
  if (depends_on_alignment &&
      backend.capabilities().causal_alignment != event.impl.backend().capabilities().causal_alignment) {
    verdict.reasons.push_back(fmt::format("{} aligns causality otherwise", backend.get_name()));
  }
  return verdict;
}

}  // namespace

void Detour::avoid(const std::string& backend) {
  const std::lock_guard lock(mutex_);
  if (std::ranges::find(avoided_, backend) == avoided_.end()) avoided_.push_back(backend);
}

// Asked at every call, because registrations may change: classes are remembered by their members.
std::vector<BackendClass> Detour::candidates(DLDevice device) const {
  std::vector<BackendClass> found;
  try {
    const std::vector<Enum> members = safer_.empty() ? platform_candidates(std::string(device_type_name(device)))
                                                     : std::vector{Enum::from_name(safer_)};
    for (const Enum member : members) {
      try {
        BackendClass backend = member.get_class();
        backend->validate_available();
        found.push_back(std::move(backend));
      } catch (const Error&) {
        continue;  // not here: no candidate
      }
    }
  } catch (const Error&) {
    return {};  // no such platform
  }
  return found;
}

BackendClass Detour::choose(const ForwardEvent& event, std::vector<std::string>* reasons) {
  std::vector<std::string> avoided;
  {
    const std::lock_guard lock(mutex_);
    avoided = avoided_;
  }
  if (avoided.empty()) return nullptr;
  for (BackendClass& backend : candidates(event.problem.device)) {  // no lock is held: it may load a plug-in
    Verdict verdict;
    if (std::ranges::find(avoided, backend->get_name()) != avoided.end()) {
      verdict.reasons.push_back(backend->get_name() + " failed itself");
    } else {
      verdict = verdict_on(*backend, event);
    }
    if (verdict) return std::move(backend);
    if (reasons != nullptr) reasons->push_back(verdict.text());
  }
  return nullptr;
}

}  // namespace ditattn
