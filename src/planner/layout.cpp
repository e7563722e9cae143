#include "planner/layout.hpp"

#include <algorithm>

namespace ditattn::planner {
namespace {

constexpr std::int64_t kFloat = 4;  // bytes of what is merged

HeadShare head_share(const Work& work, int columns, int column) {
  const std::int64_t group = work.heads / work.kv_heads;
  const Range query = share(work.heads, columns, column);
  HeadShare result{.query = query.size(), .kv = 0, .runs = {}};
  if (result.query == 0) return result;
  result.kv = (query.end + group - 1) / group - query.begin / group;
  // Parts of a group at the begin and at the end, whole groups between.
  const std::int64_t first = std::min((query.begin + group - 1) / group * group, query.end);
  const std::int64_t last = std::max(query.end / group * group, first);
  for (const std::int64_t run : {first - query.begin, last - first, query.end - last}) {
    if (run > 0) result.runs.push_back(run);
  }
  return result;
}

}  // namespace

Range share(std::int64_t total, std::int64_t parts, std::int64_t index) {
  const auto begin = [&](std::int64_t i) { return i * (total / parts) + std::min(i, total % parts); };
  return {begin(index), begin(index + 1)};
}

Layout::Layout(const Work& work, const parallel::Mesh& mesh) : work_(work), mesh_(mesh) {
  for (int column = 0; column < mesh.ulysses; ++column) {
    heads_.push_back(head_share(work, mesh.ulysses, column));
    kv_copies_ += heads_.back().kv;
  }
}

Range Layout::row_chunk(int place) const {
  const int first = place * mesh_.ulysses;
  return {share(work_.rows, ranks(), first).begin, share(work_.rows, ranks(), first + mesh_.ulysses - 1).end};
}

Range Layout::key_chunk(int place) const {
  const int first = place * mesh_.ulysses;
  return {share(work_.keys, ranks(), first).begin, share(work_.keys, ranks(), first + mesh_.ulysses - 1).end};
}

std::vector<Batch> Layout::before(int rank) const {
  if (mesh_.ulysses == 1) return {};
  std::vector<Batch> batches(3);
  for (int other = 0; other < mesh_.ulysses; ++other) {
    if (other == column(rank)) continue;
    const int to = place(rank) * mesh_.ulysses + other;
    batches[0].push_back({rank, to, bytes(rows(rank), heads(other).query)});
    for (const int kv : {1, 2})
      batches[static_cast<std::size_t>(kv)].push_back({rank, to, bytes(keys(rank), heads(other).kv)});
  }
  return batches;
}

std::vector<Batch> Layout::gather(int rank) const {
  if (mesh_.allgather == 1) return {};
  std::vector<Batch> batches(2);
  for (int other = 0; other < places(); ++other) {
    if (other == place(rank)) continue;
    const int to = other * mesh_.ulysses + column(rank);
    const std::int64_t mine = bytes(key_chunk(place(rank)).size(), heads(column(rank)).kv);
    for (Batch& batch : batches) batch.push_back({rank, to, mine});
  }
  return batches;
}

Message Layout::ring_step(int rank, int step) const {
  const int chunk = (place(rank) - step + places()) % places();
  return {rank, (rank + mesh_.ulysses) % ranks(), 2 * bytes(key_chunk(chunk).size(), heads(column(rank)).kv)};
}

std::vector<Batch> Layout::after(int rank) const {
  std::vector<Batch> batches;
  const std::int64_t mine = heads(column(rank)).query;
  if (mesh_.ulysses > 1) {
    Batch& out = batches.emplace_back();
    for (int other = 0; other < mesh_.ulysses; ++other) {
      const int to = place(rank) * mesh_.ulysses + other;
      if (to != rank) out.push_back({rank, to, bytes(rows(to), mine)});
    }
  }
  if (work_.text > 0 && ranks() > 1) {
    Batch& text = batches.emplace_back();
    for (int to = 0; to < ranks(); ++to) {
      if (to != rank) text.push_back({rank, to, bytes(text_share(place(rank)).size(), mine)});
    }
  }
  return batches;
}

std::int64_t Layout::sent_bytes(int rank) const {
  std::int64_t sum = 0;
  for (const auto& batches : {before(rank), gather(rank), after(rank)}) {
    for (const Batch& batch : batches) {
      for (const Message& message : batch) sum += message.bytes;
    }
  }
  for (int step = 0; step + 1 < mesh_.ring; ++step) sum += ring_step(rank, step).bytes;
  return sum;
}

// The slots of src/parallel/group.hpp.
std::int64_t Layout::workspace_bytes(int rank) const {
  if (ranks() == 1) return 0;
  const HeadShare& mine = heads(column(rank));
  const std::int64_t chunk_rows = row_chunk(place(rank)).size();
  std::int64_t sum = bytes(chunk_rows, mine.query) + 2 * bytes(key_chunk(place(rank)).size(), mine.kv);
  std::int64_t received = bytes(work_.text, work_.heads);
  if (mesh_.ulysses > 1) {  // what is sent, put together
    sum += bytes(rows(rank), work_.heads) + 2 * bytes(keys(rank), kv_copies_);
    received = std::max(received, bytes(rows(rank), work_.heads));
  }
  sum += received;
  if (places() == 1) return sum + bytes(work_.rows + work_.text, mine.query);
  return sum + merging_bytes(rank);
}

// Keys and values of others, and results: a call's, and those they are merged into.
std::int64_t Layout::merging_bytes(int rank) const {
  const HeadShare& mine = heads(column(rank));
  std::int64_t sum = mesh_.allgather > 1 ? 2 * bytes(work_.keys, mine.kv) : 0;
  std::int64_t next[2] = {0, 0};  // steps take turns
  for (int step = 1; step < mesh_.ring; ++step) {
    const std::int64_t keys = key_chunk((place(rank) - step + places()) % places()).size();
    next[step % 2] = std::max(next[step % 2], 2 * bytes(keys, mine.kv));
  }
  const std::int64_t rows = row_chunk(place(rank)).size();
  const std::int64_t text = text_share(place(rank)).size();
  const std::int64_t run = mine.runs.empty() ? 0 : std::ranges::max(mine.runs);
  const std::int64_t lse = work_.batch * kFloat;
  const std::int64_t rounded = work_.element == kFloat ? 0 : bytes(rows + text, mine.query);
  sum += next[0] + next[1];
  sum += bytes(std::max(rows, text), run) + lse * std::max(rows, text) * run;
  sum += elements(rows + text, mine.query) * kFloat + lse * (rows + text) * mine.query;
  return sum + rounded;
}

std::int64_t Layout::tensor_bytes(int rank) const {
  return bytes(2 * rows(rank) + work_.text, work_.heads) + 2 * bytes(keys(rank), work_.kv_heads);
}

}  // namespace ditattn::planner
