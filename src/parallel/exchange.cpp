#include "parallel/exchange.hpp"

#include <numeric>
#include <vector>

namespace ditattn::parallel {
namespace {

std::int64_t sum(std::span<const std::int64_t> numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), std::int64_t{0});
}

// Parts as they came, one after the other, to their places.
void unpack(const char* received, const Tensor& to, std::span<const Range> rows, std::span<const Range> heads) {
  for (std::size_t rank = 0; rank < rows.size(); ++rank) {
    const Tensor part = token_major(const_cast<char*>(received), to.size(0), rows[rank].size(), heads[rank].size(),
                                    to.size(3), to.dtype());
    copy(slice(slice(to, 1, rows[rank]), 2, heads[rank]), part);
    received += bytes_of(to, rows[rank].size(), heads[rank].size());
  }
}

}  // namespace

std::int64_t bytes_of(const Tensor& like, std::int64_t tokens, std::int64_t heads) {
  return like.size(0) * tokens * heads * like.size(3) * (like.dtype().bits / 8);
}

Arriving scatter_heads(Communicator& ulysses, Workspace& workspace, Slot sent, void* memory, const Tensor& mine,
                       std::span<const Range> heads, std::span<const std::int64_t> tokens) {
  const std::int64_t batch = mine.size(0);
  const std::int64_t size = mine.size(3);
  const std::int64_t my_heads = heads[static_cast<std::size_t>(ulysses.rank())].size();
  Arriving arriving{.tensor = token_major(memory, batch, sum(tokens), my_heads, size, mine.dtype()), .pending = {}};
  if (ulysses.size() == 1) {
    copy(arriving.tensor, mine);
    return arriving;
  }
  std::vector<std::int64_t> send_bytes;
  std::vector<std::int64_t> receive_bytes;
  for (std::size_t rank = 0; rank < heads.size(); ++rank) {
    send_bytes.push_back(bytes_of(mine, mine.size(1), heads[rank].size()));
    receive_bytes.push_back(bytes_of(mine, tokens[rank], my_heads));
  }
  char* const block = workspace.get(sent, sum(send_bytes));
  char* at = block;
  for (std::size_t rank = 0; rank < heads.size(); ++rank) {
    copy(token_major(at, batch, mine.size(1), heads[rank].size(), size, mine.dtype()), slice(mine, 2, heads[rank]));
    at += send_bytes[rank];
  }
  arriving.pending = ulysses.all_to_all(block, send_bytes, memory, receive_bytes, mine.device());
  return arriving;
}

void gather_heads(Communicator& ulysses, Workspace& workspace, const Tensor& rows, const Tensor& to,
                  std::span<const Range> heads, std::span<const std::int64_t> tokens) {
  if (ulysses.size() == 1) return copy(to, rows);
  std::vector<std::int64_t> send_bytes;
  std::vector<std::int64_t> receive_bytes;
  for (std::size_t rank = 0; rank < heads.size(); ++rank) {
    send_bytes.push_back(bytes_of(rows, tokens[rank], rows.size(2)));
    receive_bytes.push_back(bytes_of(to, to.size(1), heads[rank].size()));
  }
  char* const received = workspace.get(Slot::received, sum(receive_bytes));
  ulysses.all_to_all(data_pointer(rows), send_bytes, received, receive_bytes, to.device())->wait();
  unpack(received, to, std::vector<Range>(heads.size(), {0, to.size(1)}), heads);
}

void gather_parts(Communicator& all, Workspace& workspace, const Tensor& mine, const Tensor& to,
                  std::span<const Range> rows, std::span<const Range> heads) {
  std::vector<std::int64_t> bytes;
  for (std::size_t rank = 0; rank < rows.size(); ++rank) {
    bytes.push_back(bytes_of(to, rows[rank].size(), heads[rank].size()));
  }
  char* const received = workspace.get(Slot::received, sum(bytes));
  all.all_gather(data_pointer(mine), received, bytes, to.device())->wait();
  unpack(received, to, rows, heads);
}

}  // namespace ditattn::parallel
