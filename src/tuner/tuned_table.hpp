#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/registry.hpp"
#include "ditattn/tuner.hpp"
#include "tuner/tune_cache.hpp"
#include "tuner/tune_mode.hpp"

namespace ditattn {

using Member = DiffusionAttentionBackendEnum;

/// A measured problem as look-ups read it.
struct TunedEntry {
  struct Result {
    Member member;
    double median_ms;
    double error;
  };
  TunedProblem tuned;          ///< results that hold here and now
  std::vector<Result> usable;  ///< those that could be chosen, the fastest first

  [[nodiscard]] DITATTN_API const Result* of(Member member) const;
};

/// What is known for one device. Immutable.
class DITATTN_API TunedTable {
 public:
  /// Results count where the member still stands for the class path and engine that were measured; where some do not,
  /// that is logged, once. Loads the classes it has to ask.
  explicit TunedTable(const std::vector<TunedProblem>& problems);

  /// This problem, or one that is near; null where there is none.
  [[nodiscard]] const TunedEntry* find(const Problem& problem) const;
  /// The largest error that was measured of the member on any problem of this dtype, NaN if one was that; none where
  /// nothing was measured.
  [[nodiscard]] std::optional<double> worst_error(Member member, DLDataType dtype) const;
  [[nodiscard]] std::span<const TunedEntry> entries() const { return entries_; }

 private:
  using Key = std::array<std::int64_t, 9>;
  struct KeyHash {
    std::size_t operator()(const Key& key) const;
  };
  static Key exact_key(const Problem& problem);
  static Key near_key(const Problem& problem);

  struct Worst {
    Member member;
    DLDataType dtype;
    double error;
  };
  void note_error(Member member, DLDataType dtype, double error);

  std::vector<TunedEntry> entries_;
  std::unordered_map<Key, std::size_t, KeyHash> index_;
  std::vector<Worst> worst_;  // one per member and dtype
};

/// The table of a device, with the mode under which it was read: from the file at the first call, checked against the
/// registered classes again after registrations. Null with DITATTN_TUNE=off and where nothing is known. Thread-safe.
DITATTN_API std::shared_ptr<const TunedTable> tuned_table(DLDevice device);

/// DITATTN_TUNE as it was when the tables were read.
TuneMode current_tune_mode();

/// Adds what was measured to the device's table and, if asked, to its file, as `put_tuned` does. FileError where that
/// cannot be written: it is known to this process all the same.
void add_tuned(DLDevice device, const TunedProblem& problem, Others others, bool publish);

/// The best of a measured problem's members: the fastest whose error is at most `max_error`, or the first of `order`
/// (things with a `member`) that is at most 2 % slower. `may_take` is asked about members that would be chosen. None
/// where there is none.
template <class Order, class MayTake>
std::optional<Member> best_of(const TunedEntry& entry, const Order& order, double max_error, const MayTake& may_take) {
  constexpr double min_gain = 1.02;  // noise must not make choices flutter
  const auto is_good = [&](const TunedEntry::Result* result) {
    return result != nullptr && result->error <= max_error && may_take(result->member);
  };
  for (const TunedEntry::Result& fastest : entry.usable) {
    if (!is_good(&fastest)) continue;
    for (const auto& preferred : order) {
      const TunedEntry::Result* result = entry.of(preferred.member);
      if (result != nullptr && result->median_ms <= fastest.median_ms * min_gain && is_good(result)) {
        return result->member;
      }
    }
    return fastest.member;
  }
  return std::nullopt;
}

}  // namespace ditattn
