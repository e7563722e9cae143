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

/// How many query heads the first and the last part have; those between are a part too. 0: there is no such part. A
/// rank that has fewer heads than others has fewer between.
struct Cut {
  std::int64_t first = 0;
  std::int64_t last = 0;
  [[nodiscard]] int parts() const { return 1 + (first > 0 ? 1 : 0) + (last > 0 ? 1 : 0); }
  friend bool operator==(const Cut&, const Cut&) = default;
};
inline constexpr int kMostParts = 3;

/// Share `index` of `ranks`; query heads are shared out evenly. No heads where there are fewer than ranks.
Heads heads_of(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t ranks, std::int64_t index, Cut cut = {});

/// How a GPU should compute `heads`, each of `rows` rows of every batch entry: with as little as can be to exchange
/// before the first part and after the last, where all parts take no longer than all heads at once. A sixth of the
/// heads at least is in each, so that what the next part needs can come meanwhile. Not cut where there are no
/// multiprocessors.
Cut cut_that_pays(std::int64_t heads, std::int64_t batch, std::int64_t rows, std::int64_t multiprocessors);

}  // namespace ditattn::parallel
