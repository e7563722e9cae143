#include "tools/ditattn/recommendation.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace ditattn::cli {
namespace {

using Entries = std::vector<const BackendResult*>;

// What could be timed, the fastest first.
Entries by_speed(const CaseResult& result) {
  Entries entries;
  for (const BackendResult& entry : result.results) {
    if (entry.timing) entries.push_back(&entry);
  }
  std::ranges::stable_sort(entries, {}, [](const BackendResult* entry) { return entry->timing->median_ms; });
  return entries;
}

// "SAGE_ATTN, 2.4 times as fast, has an error of 8.3e-04, 417 times the bound".
std::string excess(const BackendResult& entry, const CaseResult& result, const BackendResult* best) {
  std::string text = entry.backend;
  if (best != nullptr) {
    text += fmt::format(", {:.2f} times as fast,", best->timing->median_ms / entry.timing->median_ms);
  }
  if (entry.status != Status::ok) return fmt::format("{} failed: {}", text, entry.reason);
  const double error = entry.accuracy->rel_l2;
  text += fmt::format(" has an error of {:.1e}", error);
  const double times = error / result.error_bound;
  return std::isfinite(times) ? text + fmt::format(", {:.{}f} times the bound", times, times < 100 ? 1 : 0) : text;
}

}  // namespace

std::string recommendation_text(const CaseResult& result) {
  const Entries entries = by_speed(result);
  if (entries.empty()) return "None is recommended: none could be timed.";
  const auto best =
      std::ranges::find_if(entries, [&](const BackendResult* entry) { return result.recommended == entry->backend; });
  const BackendResult* chosen = best == entries.end() ? nullptr : *best;
  std::vector<std::string> over;
  for (auto entry = entries.begin(); entry != best; ++entry) over.push_back(excess(**entry, result, chosen));
  if (chosen == nullptr) {
    return fmt::format("None is recommended: none is within the bound of {:.1e}. {}.", result.error_bound,
                       fmt::join(over, "; "));
  }
  std::string text =
      fmt::format("{} is recommended: the fastest within the bound of {:.1e}", chosen->backend, result.error_bound);
  const auto next = std::find_if(best + 1, entries.end(),
                                 [&](const BackendResult* entry) { return is_within(*entry, result.error_bound); });
  text += next == entries.end() ? ", and the only one"
                                : fmt::format(", {:.2f} times as fast as the next, {}",
                                              (*next)->timing->median_ms / chosen->timing->median_ms, (*next)->backend);
  return text + (over.empty() ? ". None was faster." : fmt::format(". Faster, but: {}.", fmt::join(over, "; ")));
}

}  // namespace ditattn::cli
