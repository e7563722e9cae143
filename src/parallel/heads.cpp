#include "parallel/heads.hpp"

#include <array>

namespace ditattn::parallel {
namespace {

std::int64_t rounded_up(std::int64_t number, std::int64_t divisor) { return (number + divisor - 1) / divisor; }

// Part `index` of so many heads.
Range part_of(std::int64_t heads, int parts, int index) {
  static constexpr std::array<std::array<int, kMostParts + 1>, kMostParts> quarters = {
      {{0, 4, 4, 4}, {0, 2, 4, 4}, {0, 1, 3, 4}}};
  const auto& borders = quarters[static_cast<std::size_t>(parts - 1)];
  const auto border = [&](int i) { return (heads * borders[static_cast<std::size_t>(i)] + 2) / 4; };
  return {border(index), border(index + 1)};
}

}  // namespace

Heads heads_of(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t ranks, std::int64_t index, int parts) {
  const std::int64_t group = num_heads / num_kv_heads;
  Heads heads{.query = share(num_heads, ranks, index), .kv = {}, .parts = {}, .runs = {}};
  if (heads.query.size() > 0) heads.kv = {heads.query.begin / group, rounded_up(heads.query.end, group)};
  std::int64_t kv_before = heads.kv.begin;
  for (int part = 0; part < parts; ++part) {
    const Range within = part_of(heads.query.size(), parts, part);
    const Range query = {heads.query.begin + within.begin, heads.query.begin + within.end};
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

int parts_that_pay(std::int64_t heads, std::int64_t blocks, std::int64_t multiprocessors) {
  if (multiprocessors == 0) return 1;
  const auto rounds_in = [&](int parts) {
    std::int64_t rounds = 0;
    for (int part = 0; part < parts; ++part) {
      rounds += rounded_up(part_of(heads, parts, part).size() * blocks, multiprocessors);
    }
    return rounds;
  };
  const std::int64_t at_once = rounds_in(1);
  int parts = static_cast<int>(std::clamp<std::int64_t>(heads, 1, kMostParts));
  while (parts > 1 && rounds_in(parts) > at_once + at_once / 32) --parts;
  return parts;
}

}  // namespace ditattn::parallel
