// Every combination of the fields marked in cases/space.txt, generated on the fly. The other fields vary with the
// case's number. Numbers are visited a golden section apart, by a stride that shares no factor with their count: a run
// that is stopped early has met every value about equally often.

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <numeric>
#include <random>
#include <stdexcept>

#include "tests/conformance/options.hpp"

namespace ditattn::conformance {
namespace {

constexpr int kMaxFailuresShown = 50;

std::string line_of(const Space& space, std::uint64_t number) {
  std::mt19937_64 random(number);
  std::string line;
  for (const Space::Field& field : space.fields) {
    std::uint64_t choice = 0;
    if (field.in_full_product) {
      choice = number % field.values.size();
      number /= field.values.size();
    } else {
      choice = random() % field.values.size();
    }
    line += fmt::format("{}{}={}", line.empty() ? "" : " ", field.name, field.values[choice]);
  }
  return line;
}

// Progress with a time estimate: redrawn on a terminal, a line a minute elsewhere.
class Progress {
 public:
  explicit Progress(std::uint64_t count) : count_(count) {}
  void step(std::uint64_t done) {
    const auto now = Clock::now();
    if (now - shown_ < (terminal_ ? std::chrono::seconds(1) : std::chrono::seconds(60)) && done < count_) return;
    shown_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double left = seconds / static_cast<double>(done) * static_cast<double>(count_ - done);
    fmt::print(stderr, "{}{} of {} cases, {:.0f} s gone, about {:.0f} min left{}", terminal_ ? "\r" : "", done, count_,
               seconds, left / 60, terminal_ ? "   " : "\n");
    if (terminal_ && done == count_) fmt::print(stderr, "\n");
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::uint64_t count_;
  bool terminal_ = isatty(STDERR_FILENO) != 0;
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_ = start_;
};

}  // namespace

std::vector<NamedBackend> chosen_backends() {
  std::vector<NamedBackend> all = backends_on(options().device);
  if (options().backends.empty()) return all;
  std::vector<NamedBackend> chosen;
  std::string rest = options().backends + ",";
  for (std::size_t comma = rest.find(','); comma != std::string::npos; comma = rest.find(',')) {
    const std::string name = rest.substr(0, comma);
    rest.erase(0, comma + 1);
    const auto found = std::find_if(all.begin(), all.end(), [&](const auto& named) { return named.member == name; });
    if (found == all.end()) throw std::runtime_error("no backend '" + name + "' computes on the CPU here");
    chosen.push_back(*found);
  }
  return chosen;
}

int run_full(std::uint64_t count) {
  const Space space = load_space();
  std::uint64_t product = 1;
  for (const Space::Field& field : space.fields) product *= field.in_full_product ? field.values.size() : 1;
  if (count == 0 || count > product) count = product;
  auto stride = static_cast<std::uint64_t>(0.618033988749895 * static_cast<double>(product));
  while (std::gcd(stride, product) != 1) ++stride;

  const std::vector<NamedBackend> backends = chosen_backends();
  if (backends.empty()) throw std::runtime_error("no backend computes on the CPU here");
  fmt::print(stderr, "{} of {} combinations, seed {}\n", count, product, options().seed);
  Tally tally;
  Progress progress(count);
  int failures = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    const Case c = parse_case(line_of(space, i * stride % product));
    run_case(c, backends, options().device, options().seed, tally, [&](const std::string& text) {
      if (++failures <= kMaxFailuresShown) fmt::print("{}\n", text);
    });
    progress.step(i + 1);
  }
  fmt::print("{}{} failures\n", tally.table(), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace ditattn::conformance
