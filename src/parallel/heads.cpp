#include "parallel/heads.hpp"

#include <array>

namespace ditattn::parallel {
namespace {

std::int64_t rounded_up(std::int64_t number, std::int64_t divisor) { return (number + divisor - 1) / divisor; }

// Part by part.
std::vector<Range> parts_of(Range heads, Cut cut) {
  const std::int64_t first = std::min(heads.begin + cut.first, heads.end);
  const std::int64_t last = std::max(heads.end - cut.last, first);
  std::vector<Range> parts;
  if (cut.first > 0) parts.push_back({heads.begin, first});
  parts.push_back({first, last});
  if (cut.last > 0) parts.push_back({last, heads.end});
  return parts;
}

// Of a GPU's kernels: how long a multiprocessor takes for one, in hundredths of a row's time in the largest.
struct Tile {
  std::int64_t rows;
  std::int64_t time;
};
constexpr std::array kTiles = {Tile{192, 192 * 100}, Tile{128, 128 * 117}, Tile{64, 64 * 182}};  // FLASH_ATTN's

}  // namespace

Heads heads_of(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t ranks, std::int64_t index, Cut cut) {
  const std::int64_t group = num_heads / num_kv_heads;
  Heads heads{.query = share(num_heads, ranks, index), .kv = {}, .parts = {}, .runs = {}};
  if (heads.query.size() > 0) heads.kv = {heads.query.begin / group, rounded_up(heads.query.end, group)};
  std::int64_t kv_before = heads.kv.begin;
  for (const Range query : parts_of(heads.query, cut)) {
    const std::int64_t kv_end = query.size() > 0 ? rounded_up(query.end, group) : kv_before;
    heads.parts.push_back({.query = query, .kv = {kv_before, kv_end}});
    kv_before = kv_end;
    for (std::int64_t at = query.begin; at < query.end;) {
      const std::int64_t kv = at / group;
      std::int64_t end = std::min((kv + 1) * group, query.end);
      if (at % group == 0) end = std::max(end, query.end / group * group);  // all whole groups together
      heads.runs.push_back({.query = {at, end}, .kv = {kv, rounded_up(end, group)}});
      at = end;
    }
  }
  return heads;
}

Cut cut_that_pays(std::int64_t heads, std::int64_t batch, std::int64_t rows, std::int64_t multiprocessors) {
  if (multiprocessors == 0 || heads < 2 || rows == 0) return {};
  const auto time_of = [&](std::int64_t some) {
    const auto with = [&](const Tile& tile) {
      return rounded_up(some * batch * rounded_up(rows, tile.rows), multiprocessors) * tile.time;
    };
    return std::min({with(kTiles[0]), with(kTiles[1]), with(kTiles[2])});
  };
  std::vector<std::int64_t> times;  // of so many heads
  for (std::int64_t some = 0; some <= heads; ++some) times.push_back(time_of(some));
  const auto time = [&](std::int64_t some) { return times[static_cast<std::size_t>(some)]; };
  const std::int64_t least = rounded_up(heads, 6);
  Cut best;
  std::int64_t best_exposed = 4 * heads;  // Q, K and V of the first part, the result of the last
  const auto consider = [&](Cut cut) {
    const std::int64_t between = heads - cut.first - cut.last;
    const std::int64_t exposed = 3 * cut.first + (cut.last > 0 ? cut.last : between);
    if (exposed >= best_exposed || time(cut.first) + time(between) + time(cut.last) > time(heads)) return;
    best = cut;
    best_exposed = exposed;
  };
  for (std::int64_t first = least; first < heads; ++first) {
    consider({.first = first, .last = 0});
    for (std::int64_t last = least; last < heads - first; ++last) consider({.first = first, .last = last});
  }
  return best;
}

}  // namespace ditattn::parallel
