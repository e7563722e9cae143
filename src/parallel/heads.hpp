#pragma once

/// Which heads a rank computes when heads are shared out, whether or not ranks divide them.

#include <vector>

#include "parallel/tokens.hpp"

namespace ditattn::parallel {

/// Query heads that have their K/V heads evenly: as many of them for each K/V head.
struct HeadRun {
  Range query;
  Range kv;
};

/// Heads of one rank, and the calls they come to: where a rank's share cuts through a K/V head's query heads, that
/// head is a call of its own, so three at most.
struct Heads {
  Range query;
  Range kv;  ///< those that the query heads need: two ranks may have the same one
  std::vector<HeadRun> runs;
};

/// Part `index` of `parts`; query heads are shared out evenly. No heads where there are fewer than parts.
Heads heads_of(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t parts, std::int64_t index);

}  // namespace ditattn::parallel
