#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// Times several things against each other: in interleaved rounds, so that drifts of the machine's speed meet all
/// alike, forwards and backwards in turn, so that nobody always follows one that leaves what it needs in the caches.
/// Times are the host's, with the device's work done; calls shorter than a millisecond are timed several at
/// once, since clocks, wake-ups and waiting would blur them.
class DITATTN_API Rounds {
 public:
  using Call = std::function<void()>;

  explicit Rounds(DLDevice device) : device_(device) {}

  /// Warms up, for 20 ms or ten calls, and returns the entry's index. What `call` throws goes through; it is then not
  /// timed.
  std::size_t add(Call call);

  /// Milliseconds of the quickest call that warmed up: it decides who is timed in rounds at all, and one stall of the
  /// machine must not.
  [[nodiscard]] double call_ms(std::size_t index) const { return entries_[index].call_ms; }

  /// How many rounds of the given entries fit in `budget_ms`, 3 to 50.
  [[nodiscard]] int affordable(const std::vector<std::size_t>& indices, double budget_ms) const;

  /// Times the given entries `rounds` times more. `failed` is called, within a handler, for one that throws: it gets no
  /// further turn. `report` is told of each turn.
  void run(const std::vector<std::size_t>& indices, int rounds, const std::function<void(std::size_t)>& failed,
           const std::function<void(std::size_t index, int round)>& report = {});

  /// Milliseconds per call, of all rounds so far, ascending.
  [[nodiscard]] std::vector<double> sorted_ms(std::size_t index) const;
  /// Their median; `call_ms` where there was no round.
  [[nodiscard]] double median_ms(std::size_t index) const;
  /// The median of one's time over another's in the same round, in all of which both had their turns: what slows the
  /// machine for some rounds, and shifts medians apart, is in both. The medians' ratio where there was no round.
  [[nodiscard]] double median_ratio(std::size_t index, std::size_t over) const;

 private:
  struct Entry {
    Call call;
    double call_ms = 0;
    std::vector<double> samples_ms = {};
  };

  [[nodiscard]] double sample(const Entry& entry) const;

  DLDevice device_;
  std::vector<Entry> entries_;
};

}  // namespace ditattn
