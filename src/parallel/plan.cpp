#include "parallel/plan.hpp"

#include <algorithm>

#include "parallel/agreement.hpp"

namespace ditattn::parallel {
namespace {

std::vector<PlannedCall> calls_of(const PlanRequest& request, const std::vector<Piece>& pieces, const Segment& rows,
                                  const Segment& keys) {
  std::vector<PlannedCall> calls;
  const auto blocks =
      calls_between(pieces, joined_rows(request.sizes, rows), joined_keys(request.sizes, keys), request.alignment);
  for (BlockCall block : blocks) {
    if (block.causal && block.keys.size() == 1) {  // a single key's diagonal leaves all rows or the last one
      if (request.alignment == CausalAlignment::bottom_right) block.rows.begin = block.rows.end - 1;
      block.causal = false;
    }
    for (std::size_t run = 0; run < request.heads.size(); ++run) {
      calls.push_back(
          {.block = block,
           .run = run,
           .metadata = call_metadata(request.metadata, request.sizes, request.heads[run], rows, keys, block)});
    }
  }
  return calls;
}

}  // namespace

bool same(const PlanRequest& a, const PlanRequest& b) {
  const auto same_heads = [](const HeadRun& x, const HeadRun& y) { return x.query == y.query && x.kv == y.kv; };
  return a.metadata.get() == b.metadata.get() && a.sizes == b.sizes && a.row_chunks == b.row_chunks &&
         a.key_chunks == b.key_chunks && a.place == b.place && std::ranges::equal(a.heads, b.heads, same_heads) &&
         a.causal == b.causal && a.alignment == b.alignment;
}

Plan make_plan(const PlanRequest& request) {
  const Sizes& sizes = request.sizes;
  Plan plan;
  const auto places = static_cast<std::int64_t>(request.row_chunks.size());
  if (places == 1) {
    for (const HeadRun& run : request.heads) plan.whole.push_back(head_metadata(request.metadata, sizes, run));
    return plan;
  }
  const RangeRequest whole{.batch = sizes.batch,
                           .rows = sizes.total_rows(),
                           .keys = sizes.total_keys(),
                           .causal = request.causal,
                           .alignment = request.alignment};
  const auto ranges = request.metadata.defined() ? request.metadata->key_ranges(whole) : nullptr;
  const std::vector<Piece> pieces = visible_pieces(whole, ranges.get());

  plan.rows[0] = {.joint = true, .tokens = share(sizes.joint_rows, places, request.place)};
  plan.rows[1] = {.joint = false, .tokens = request.row_chunks[static_cast<std::size_t>(request.place)]};
  plan.keys.push_back({.joint = true, .tokens = {0, sizes.joint_keys}});
  for (const Range& chunk : request.key_chunks) {
    const auto valid = [&](std::int64_t key) { return std::min(key, sizes.valid_keys); };
    plan.keys.push_back({.joint = false, .tokens = {valid(chunk.begin), valid(chunk.end)}});
  }
  for (const Segment& keys : plan.keys) {
    plan.calls.push_back(
        {calls_of(request, pieces, plan.rows[0], keys), calls_of(request, pieces, plan.rows[1], keys)});
  }
  return plan;
}

std::shared_ptr<const Plan> PlanCache::get(const PlanRequest& request) {
  const auto found = std::ranges::find_if(entries_, [&](const Entry& entry) { return same(entry.request, request); });
  if (found != entries_.end()) return found->plan;
  if (entries_.size() == kKeptKinds) entries_.erase(entries_.begin());
  entries_.push_back({request, std::make_shared<const Plan>(make_plan(request))});
  return entries_.back().plan;
}

}  // namespace ditattn::parallel
