#include "tuner/rounds.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <set>

#include "ditattn/cuda.hpp"

namespace ditattn {
namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;

constexpr int kMinRounds = 3;
constexpr int kMaxRounds = 50;
constexpr double kSampleMs = 1;
constexpr int kMaxCallsPerSample = 1000;
constexpr double kWarmUpMs = 20;
constexpr int kMaxWarmUpCalls = 10;

double median(const std::vector<double>& sorted) {
  const std::size_t middle = sorted.size() / 2;
  return sorted.size() % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

}  // namespace

std::size_t Rounds::add(Call call) {
  Entry entry{.call = std::move(call), .call_ms = std::numeric_limits<double>::infinity()};
  const auto start = Clock::now();
  for (int calls = 0; calls < kMaxWarmUpCalls; ++calls) {
    const auto before = Clock::now();
    entry.call();
    synchronize(device_);
    const auto now = Clock::now();
    entry.call_ms = std::min(entry.call_ms, Milliseconds(now - before).count());
    if (Milliseconds(now - start).count() > kWarmUpMs) break;
  }
  entries_.push_back(std::move(entry));
  return entries_.size() - 1;
}

int Rounds::affordable(const std::vector<std::size_t>& indices, double budget_ms) const {
  double round_ms = 0;
  for (const std::size_t index : indices) round_ms += std::max(entries_[index].call_ms, kSampleMs);
  return static_cast<int>(std::clamp<double>(budget_ms / std::max(round_ms, kSampleMs), kMinRounds, kMaxRounds));
}

double Rounds::sample(const Entry& entry) const {
  const double wanted = kSampleMs / std::max(entry.call_ms, 1e-6);
  const int calls = static_cast<int>(std::clamp<double>(std::ceil(wanted), 1, kMaxCallsPerSample));
  const auto start = Clock::now();
  for (int i = 0; i < calls; ++i) entry.call();
  synchronize(device_);
  return Milliseconds(Clock::now() - start).count() / calls;
}

void Rounds::run(const std::vector<std::size_t>& indices, int rounds, const std::function<void(std::size_t)>& failed,
                 const std::function<void(std::size_t index, int round)>& report) {
  std::set<std::size_t> broken;
  std::vector<std::size_t> turns = indices;
  for (int round = 0; round < rounds; ++round, std::ranges::reverse(turns)) {
    for (const std::size_t index : turns) {
      if (broken.contains(index)) continue;
      if (report) report(index, round);
      try {
        entries_[index].samples_ms.push_back(sample(entries_[index]));
      } catch (...) {
        broken.insert(index);
        failed(index);
      }
    }
  }
}

std::vector<double> Rounds::sorted_ms(std::size_t index) const {
  std::vector<double> sorted = entries_[index].samples_ms;
  std::ranges::sort(sorted);
  return sorted;
}

double Rounds::median_ms(std::size_t index) const {
  const std::vector<double> sorted = sorted_ms(index);
  return sorted.empty() ? entries_[index].call_ms : median(sorted);
}

double Rounds::median_ratio(std::size_t index, std::size_t over) const {
  std::vector<double> ratios;
  std::ranges::transform(entries_[index].samples_ms, entries_[over].samples_ms, std::back_inserter(ratios),
                         std::divides());
  if (ratios.empty()) return median_ms(index) / median_ms(over);
  std::ranges::sort(ratios);
  return median(ratios);
}

}  // namespace ditattn
