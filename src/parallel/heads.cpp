#include "parallel/heads.hpp"

namespace ditattn::parallel {

Heads heads_of(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t parts, std::int64_t index) {
  const std::int64_t group = num_heads / num_kv_heads;
  Heads heads{.query = share(num_heads, parts, index), .kv = {}, .runs = {}};
  if (heads.query.size() == 0) return heads;
  heads.kv = {heads.query.begin / group, (heads.query.end + group - 1) / group};
  for (std::int64_t at = heads.query.begin; at < heads.query.end;) {
    const std::int64_t kv = at / group;
    std::int64_t end = std::min((kv + 1) * group, heads.query.end);
    if (at % group == 0) end = std::max(end, heads.query.end / group * group);  // all whole groups together
    heads.runs.push_back({.query = {at, end}, .kv = {kv, (end + group - 1) / group}});
    at = end;
  }
  return heads;
}

}  // namespace ditattn::parallel
