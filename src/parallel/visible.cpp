#include "parallel/visible.hpp"

#include <algorithm>

namespace ditattn::parallel {
namespace {

// Rows [first, …) of one batch entry (or of all, `batch`) as pieces: successive rows that see the same, or each one key
// more than the one before.
void add_runs(const KeyRanges& ranges, std::int64_t entry, Range batch, std::int64_t rows, std::vector<Piece>& pieces) {
  const std::int64_t* bounds = ranges.bounds.data() + entry * ranges.batch_stride;
  for (std::int64_t first = 0; first < rows;) {
    const Range keys{bounds[2 * first], bounds[2 * first + 1]};
    const auto continues = [&](std::int64_t row, std::int64_t step) {
      return bounds[2 * row] == keys.begin && bounds[2 * row + 1] == keys.end + step * (row - first);
    };
    std::int64_t next = first + 1;
    const bool grows = next < rows && continues(next, 1);
    while (next < rows && continues(next, grows ? 1 : 0)) ++next;
    if (keys.size() > 0 || grows)
      pieces.push_back({.batch = batch, .rows = {first, next}, .keys = keys, .grows = grows});
    first = next;
  }
}

void add_calls(const Piece& piece, Range rows, Range keys, CausalAlignment alignment, std::vector<BlockCall>& calls) {
  const std::int64_t begin = std::max(piece.keys.begin, keys.begin);
  Range seen{std::max(piece.rows.begin, rows.begin), std::min(piece.rows.end, rows.end)};
  // `end` of the first row; every further row sees `step` more.
  const std::int64_t step = piece.grows ? 1 : 0;
  std::int64_t end = piece.keys.end + step * (seen.begin - piece.rows.begin);
  const auto add = [&](Range of_rows, Range of_keys, bool causal) {
    if (of_rows.size() <= 0 || of_keys.size() <= 0) return;
    calls.push_back({.batch = piece.batch,
                     .rows = {of_rows.begin - rows.begin, of_rows.end - rows.begin},
                     .keys = {of_keys.begin - keys.begin, of_keys.end - keys.begin},
                     .causal = causal});
  };
  if (!piece.grows) return add(seen, {begin, std::min(end, keys.end)}, false);

  const std::int64_t blind = std::max<std::int64_t>(begin + 1 - end, 0);  // rows that see nothing here
  seen.begin += blind;
  end += blind;
  // Rows up to the one that reaches the last key are the triangle; those after it see all keys.
  const std::int64_t full = std::clamp(seen.begin + keys.end - end + 1, seen.begin, std::max(seen.begin, seen.end));
  const Range triangle{seen.begin, full};
  std::int64_t diagonal = begin;  // where the back end's rule has the first row see one key
  if (alignment == CausalAlignment::top_left && triangle.size() > 1) {
    diagonal = end - 1;
    add(triangle, {begin, diagonal}, false);
  }
  add(triangle, {diagonal, end + triangle.size() - 1}, triangle.size() > 1);
  add({full, seen.end}, {begin, keys.end}, false);
}

}  // namespace

std::vector<Piece> visible_pieces(const RangeRequest& request, const KeyRanges* ranges) {
  std::vector<Piece> pieces;
  const Range all{0, request.batch};
  if (ranges == nullptr) {
    const bool bottom_right = request.alignment == CausalAlignment::bottom_right;
    const std::int64_t offset = bottom_right ? request.keys - request.rows : 0;
    const std::int64_t first_end = request.causal ? offset + 1 : request.keys;
    pieces.push_back({.batch = all, .rows = {0, request.rows}, .keys = {0, first_end}, .grows = request.causal});
  } else if (ranges->batch_stride == 0) {
    add_runs(*ranges, 0, all, request.rows, pieces);
  } else {
    for (std::int64_t entry = 0; entry < request.batch; ++entry) {
      add_runs(*ranges, entry, {entry, entry + 1}, request.rows, pieces);
    }
  }
  return pieces;
}

std::vector<BlockCall> calls_between(const std::vector<Piece>& pieces, Range rows, Range keys,
                                     CausalAlignment alignment) {
  std::vector<BlockCall> calls;
  for (const Piece& piece : pieces) add_calls(piece, rows, keys, alignment, calls);
  return calls;
}

}  // namespace ditattn::parallel
