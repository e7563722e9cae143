#pragma once

/// Which keys which rows see, as rectangles and triangles: what a back end can be asked for a part at a time.

#include <vector>

#include "ditattn/metadata.hpp"
#include "parallel/tokens.hpp"

namespace ditattn::parallel {

/// Rows of some batch entries, in joined order: the first sees the keys [keys.begin, keys.end), each further one the
/// same, or, where it `grows`, one more than the one before.
struct Piece {
  Range batch;
  Range rows;
  Range keys;
  bool grows = false;
  friend bool operator==(const Piece&, const Piece&) = default;
};

/// All that is seen. `ranges` are the metadata's (null: none); causality is in them where they are. Keys that do not
/// exist may be among what a growing piece sees.
std::vector<Piece> visible_pieces(const RangeRequest& request, const KeyRanges* ranges);

/// One call of a back end: rows and keys counted from their segments' first ones.
struct BlockCall {
  Range batch;
  Range rows;
  Range keys;
  bool causal = false;  ///< by the back end's own rule
  friend bool operator==(const BlockCall&, const BlockCall&) = default;
};

/// What of `pieces` lies in these rows and keys (joined order), in calls that need no causal offset: where the
/// diagonal does not start or end as the back end's causal rule has it, the keys or rows beside it are calls of their
/// own. A block that nothing is seen of gives no calls.
std::vector<BlockCall> calls_between(const std::vector<Piece>& pieces, Range rows, Range keys,
                                     CausalAlignment alignment);

}  // namespace ditattn::parallel
