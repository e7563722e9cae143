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

/// Query heads that are exchanged and computed together, and the K/V heads that come with them: those that they need
/// and no part before did.
struct HeadPart {
  Range query;
  Range kv;
};

/// Heads of one rank, and the calls they come to: where a rank's share, or a part of it, cuts through a K/V head's
/// query heads, that head is a call of its own, so three for a part at most.
struct Heads {
  Range query;
  Range kv;                     ///< those that the query heads need: two ranks may have the same one
  std::vector<HeadPart> parts;  ///< some of no heads, where these are few
  std::vector<HeadRun> runs;    ///< of one part after the other
};

/// A part is halves of a rank's heads where there are two, a quarter, a half and a quarter where there are three: what
/// is exchanged before the first is computed and after the last is all that cannot be hidden.
inline constexpr int kMostParts = 3;

/// Share `index` of `ranks`; query heads are shared out evenly. No heads where there are fewer than ranks.
Heads heads_of(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t ranks, std::int64_t index,
               int parts = 1);

/// In how many parts a GPU should compute `heads`, each of so many blocks of rows: the most that take no more rounds of
/// its multiprocessors, but for a 32nd, than all heads at once. One where there are no multiprocessors.
int parts_that_pay(std::int64_t heads, std::int64_t blocks, std::int64_t multiprocessors);

}  // namespace ditattn::parallel
