#include "tools/ditattn/recommendation.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace ditattn::cli {
namespace {

struct Entry {
  const BackendResult* result;
  double median_ms;
};
using Entries = std::vector<Entry>;

// What could be timed, the fastest first.
Entries by_speed(const CaseResult& result) {
  Entries entries;
  for (const BackendResult& entry : result.results) {
    if (entry.timing) entries.push_back({&entry, entry.timing->median_ms});
  }
  std::ranges::stable_sort(entries, {}, &Entry::median_ms);
  return entries;
}

// "SAGE_ATTN, 2.4 times as fast, has an error of 8.3e-04, 417 times the bound".
std::string excess(const Entry& entry, const CaseResult& result, const Entry* best) {
  std::string text = entry.result->backend;
  if (best != nullptr) text += fmt::format(", {:.2f} times as fast,", best->median_ms / entry.median_ms);
  if (entry.result->status != Status::ok) return fmt::format("{} failed: {}", text, entry.result->reason);
  const double error = entry.result->accuracy.value().rel_l2;
  text += fmt::format(" has an error of {:.1e}", error);
  const double times = error / result.error_bound;
  return std::isfinite(times) ? text + fmt::format(", {:.{}f} times the bound", times, times < 100 ? 1 : 0) : text;
}

}  // namespace

std::string recommendation_text(const CaseResult& result) {
  const Entries entries = by_speed(result);
  if (entries.empty()) return "None is recommended: none could be timed.";
  const auto best =
      std::ranges::find_if(entries, [&](const Entry& entry) { return result.recommended == entry.result->backend; });
  const Entry* chosen = best == entries.end() ? nullptr : &*best;
  std::vector<std::string> over;
  for (auto entry = entries.begin(); entry != best; ++entry) over.push_back(excess(*entry, result, chosen));
  if (chosen == nullptr) {
    return fmt::format("None is recommended: none is within the bound of {:.1e}. {}.", result.error_bound,
                       fmt::join(over, "; "));
  }
  std::string text = fmt::format("{} is recommended: the fastest within the bound of {:.1e}", chosen->result->backend,
                                 result.error_bound);
  const auto next = std::find_if(best + 1, entries.end(),
                                 [&](const Entry& entry) { return is_within(*entry.result, result.error_bound); });
  text += next == entries.end() ? ", and the only one"
                                : fmt::format(", {:.2f} times as fast as the next, {}",
                                              next->median_ms / chosen->median_ms, next->result->backend);
  return text + (over.empty() ? ". None was faster." : fmt::format(". Faster, but: {}.", fmt::join(over, "; ")));
}

}  // namespace ditattn::cli
