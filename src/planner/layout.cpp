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

Batch Layout::before(int rank) const {
  Batch batch;
  for (int other = 0; other < mesh_.ulysses; ++other) {
    const int to = place(rank) * mesh_.ulysses + other;
    if (to != rank) {
      batch.push_back({rank, to, bytes(rows(rank), heads(other).query) + 2 * bytes(keys(rank), heads(other).kv)});
    }
  }
  return batch;
}

Batch Layout::gather(int rank) const {
  if (mesh_.allgather == 1) return {};
  Batch batch;
  for (int other = 0; other < places(); ++other) {
    const int to = other * mesh_.ulysses + column(rank);
    if (to != rank) batch.push_back({rank, to, 2 * bytes(key_chunk(place(rank)).size(), heads(column(rank)).kv)});
  }
  return batch;
}

Message Layout::ring_step(int rank, int step) const {
  const int chunk = (place(rank) - step + places()) % places();
  return {rank, (rank + mesh_.ulysses) % ranks(), 2 * bytes(key_chunk(chunk).size(), heads(column(rank)).kv)};
}

Batch Layout::after(int rank) const {
  Batch batch;
  for (int other = 0; other < mesh_.ulysses; ++other) {
    const int to = place(rank) * mesh_.ulysses + other;
    if (to != rank) batch.push_back({rank, to, bytes(rows(to), heads(column(rank)).query)});
  }
  return batch;
}

Batch Layout::text(int rank) const {
  Batch batch;
  for (int to = 0; to < ranks(); ++to) {
    if (to != rank) batch.push_back({rank, to, bytes(text_share(place(rank)).size(), heads(column(rank)).query)});
  }
  return batch;
}

std::int64_t Layout::sent_bytes(int rank) const {
  std::int64_t sum = 0;
  for (const Batch& batch : {before(rank), gather(rank), after(rank), text(rank)}) {
    for (const Message& message : batch) sum += message.bytes;
  }
  for (int step = 0; step + 1 < mesh_.ring; ++step) sum += ring_step(rank, step).bytes;
  return sum;
}

std::int64_t Layout::parts(std::int64_t rows) const {
  if (rows == 0) return 0;
  std::int64_t parts = work_.text > 0 ? 1 : 0;
  if (mesh_.ring == 1) return parts + (work_.keys > 0 ? 1 : 0);
  for (int chunk = 0; chunk < places(); ++chunk) parts += key_chunk(chunk).size() > 0 ? 1 : 0;
  return parts;
}

// Of one batch, or of one token, tensors have one token after the other.
std::int64_t Layout::copied_keys(int rank) const {
  if (mesh_.ulysses > 1 || work_.batch == 1 || keys(rank) == 1) return 0;
  return 2 * bytes(keys(rank), work_.kv_heads);
}

// The slots of src/parallel/group.hpp.
std::int64_t Layout::workspace_bytes(int rank) const {
  if (ranks() == 1) return 0;
  const HeadShare& mine = heads(column(rank));
  std::int64_t sum = copied_keys(rank);
  sum += bytes(work_.text, work_.heads);  // of the text's rows that others computed
  if (mesh_.ulysses > 1) {
    const std::int64_t rows_of_others = bytes(rows(rank), work_.heads - mine.query);
    sum += rows_of_others + 2 * bytes(keys(rank), kv_copies_ - mine.kv);  // put together to be sent
    sum += bytes(row_chunk(place(rank)).size(), mine.query) + 2 * bytes(key_chunk(place(rank)).size(), mine.kv);
    sum += rows_of_others;  // and of the image's
  }
  if (places() == 1) return sum + bytes(work_.rows + work_.text, mine.query);
  return sum + arriving_bytes(rank) + result_bytes(rank);
}

// Keys and values of other places.
std::int64_t Layout::arriving_bytes(int rank) const {
  const std::int64_t kv = heads(column(rank)).kv;
  if (mesh_.allgather > 1) return 2 * bytes(work_.keys, kv);
  std::int64_t next[2] = {0, 0};  // steps take turns
  for (int step = 1; step < mesh_.ring; ++step) {
    const std::int64_t keys = key_chunk((place(rank) - step + places()) % places()).size();
    next[step % 2] = std::max(next[step % 2], 2 * bytes(keys, kv));
  }
  return next[0] + next[1];
}

// The text's rows and the image's, each with its LSE: what a call returns, the first part, the sums, the result.
std::int64_t Layout::result_bytes(int rank) const {
  const HeadShare& mine = heads(column(rank));
  const std::int64_t run = mine.runs.empty() ? 0 : std::ranges::max(mine.runs);
  const auto lse = [&](std::int64_t rows, std::int64_t heads) { return work_.batch * rows * heads * kFloat; };
  std::int64_t sum = 0;
  std::int64_t part = 0;
  for (const bool is_text : {true, false}) {
    const std::int64_t rows = is_text ? text_share(place(rank)).size() : row_chunk(place(rank)).size();
    if (is_text || mesh_.ulysses > 1) sum += bytes(rows, mine.query);  // else the output itself
    sum += lse(rows, mine.query);
    if (parts(rows) > 1 || !mine.is_one_run()) part = std::max(part, bytes(rows, run) + lse(rows, run));
    if (parts(rows) > 1 && mine.is_one_run()) sum += bytes(rows, mine.query);
    if (parts(rows) > 2 || !mine.is_one_run()) sum += elements(rows, mine.query) * kFloat;
  }
  return sum + part;
}

std::int64_t Layout::tensor_bytes(int rank) const {
  return bytes(2 * rows(rank) + work_.text, work_.heads) + 2 * bytes(keys(rank), work_.kv_heads);
}

}  // namespace ditattn::planner
