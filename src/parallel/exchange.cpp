#include "parallel/exchange.hpp"

namespace ditattn::parallel {
namespace {

// Blocks of no bytes are not sent.
void send(std::vector<SendBlock>& blocks, int rank, const Tensor& tensor) {
  if (tensor.numel() > 0) blocks.push_back({rank, data_pointer(tensor), bytes_of(tensor)});
}
// `packed` may be where they are.
void send(std::vector<SendTokens>& blocks, int rank, const Tensor& tensor, void* packed) {
  if (tensor.numel() > 0) blocks.push_back({rank, tensor, packed});
}
void receive(std::vector<ReceiveBlock>& blocks, int rank, const Tensor& tensor) {
  if (tensor.numel() > 0) blocks.push_back({rank, data_pointer(tensor), bytes_of(tensor)});
}

std::size_t place_of(const Communicator& communicator) { return static_cast<std::size_t>(communicator.rank()); }

// Successive ranges of these lengths.
std::vector<Range> ranges_of(std::span<const std::int64_t> lengths) {
  std::vector<Range> ranges;
  std::int64_t at = 0;
  for (std::int64_t length : lengths) {
    ranges.push_back({at, at + length});
    at += length;
  }
  return ranges;
}

// Two ranks may have the same K/V head.
std::int64_t heads_of_others(std::span<const Range> heads, std::size_t place) {
  std::int64_t count = 0;
  for (std::size_t rank = 0; rank < heads.size(); ++rank) count += rank == place ? 0 : heads[rank].size();
  return count;
}

}  // namespace

std::int64_t bytes_of(const Tensor& like, std::int64_t tokens, std::int64_t heads) {
  return like.size(0) * tokens * heads * like.size(3) * (like.dtype().bits / 8);
}

Tensor HeadScatter::add(Slot sent, Slot kept, const Tensor& mine, std::span<const Range> heads,
                        std::span<const std::int64_t> tokens) {
  const std::size_t place = place_of(ulysses_);
  const auto make = [&](char* at, std::int64_t length, Range of) {
    return token_major(at, mine.size(0), length, of.size(), mine.size(3), mine.dtype(), mine.device());
  };
  const std::vector<Range> chunks = ranges_of(tokens);
  const std::int64_t total = chunks.back().end;
  Tensor collected = make(workspace_.get(kept, bytes_of(mine, total, heads[place].size()), part_), total, heads[place]);
  char* at = workspace_.get(sent, bytes_of(mine, mine.size(1), heads_of_others(heads, place)), part_);
  device_ = mine.device();
  for (std::size_t rank = 0; rank < heads.size(); ++rank) {
    const Tensor theirs = slice(mine, 2, heads[rank]);
    const Tensor place_of_theirs = slice(collected, 1, chunks[rank]);
    if (rank == place) {
      (first_ != nullptr ? *first_ : *this).own_.push_back({.to = place_of_theirs, .from = theirs});
      continue;
    }
    send(sends_, static_cast<int>(rank), theirs, at);
    receive(receives_, static_cast<int>(rank), place_of_theirs);
    at += bytes_of(theirs);
  }
  return collected;
}

std::unique_ptr<Pending> HeadScatter::start(Meanwhile meanwhile) {
  return ulysses_.start_tokens(Operation::all_to_all, sends_, receives_, device_, meanwhile, own_);
}

void HeadGather::add_rows(Slot received, const Tensor& mine, const Tensor& to, std::span<const Range> heads,
                          std::span<const std::int64_t> tokens) {
  const std::size_t place = place_of(ranks_);
  const std::vector<Range> chunks = ranges_of(tokens);
  char* at = workspace_.get(received, bytes_of(to, to.size(1), heads_of_others(heads, place)), part_);
  for (std::size_t rank = 0; rank < heads.size(); ++rank) {
    const Tensor theirs = slice(mine, 1, chunks[rank]);
    const Tensor of_theirs = slice(to, 2, heads[rank]);
    if (rank == place) {
      if (data_pointer(theirs) == data_pointer(of_theirs)) continue;  // computed where it belongs
      own_.push_back({.to = of_theirs, .from = theirs});
      continue;
    }
    send(sends_, static_cast<int>(rank), theirs, data_pointer(theirs));
    const Tensor part =
        token_major(at, to.size(0), to.size(1), heads[rank].size(), to.size(3), to.dtype(), to.device());
    at += bytes_of(part);
    receive(receives_, static_cast<int>(rank), part);
    unpacking_.push_back({.to = of_theirs, .from = part});
  }
}

void HeadGather::add_shared(Slot received, const Tensor& mine, const Tensor& to, std::span<const Range> rows,
                            std::span<const Range> heads) {
  const auto bytes_from = [&](std::size_t rank) { return bytes_of(to, rows[rank].size(), heads[rank].size()); };
  std::int64_t total = 0;
  for (std::size_t rank = 0; rank < rows.size(); ++rank) total += bytes_from(rank);
  char* at = workspace_.get(received, total, part_);
  for (std::size_t rank = 0; rank < rows.size(); ++rank) {
    const Tensor of_theirs = slice(slice(to, 1, rows[rank]), 2, heads[rank]);
    if (rank == place_of(ranks_)) {
      own_.push_back({.to = of_theirs, .from = mine});
      continue;
    }
    send(sends_, static_cast<int>(rank), mine, data_pointer(mine));
    const Tensor part =
        token_major(at, to.size(0), rows[rank].size(), heads[rank].size(), to.size(3), to.dtype(), to.device());
    at += bytes_from(rank);
    receive(receives_, static_cast<int>(rank), part);
    unpacking_.push_back({.to = of_theirs, .from = part});
  }
}

void HeadGather::start(Operation operation, Meanwhile meanwhile, std::span<HeadGather> before) {
  std::vector<TokenCopy> copies = own_;
  for (HeadGather& batch : before) {
    if (batch.pending_) batch.pending_->wait();
    copies.insert(copies.end(), batch.own_.begin(), batch.own_.end());
    copies.insert(copies.end(), batch.unpacking_.begin(), batch.unpacking_.end());
  }
  if (unpacking_.empty()) return copy(copies);
  pending_ = ranks_.start_tokens(operation, sends_, receives_, unpacking_.front().to.device(), meanwhile, copies);
}

void HeadGather::start_first(Operation operation) {
  if (unpacking_.empty()) return;
  const DLDevice device = unpacking_.front().to.device();
  pending_ = ranks_.start_tokens(operation, sends_, receives_, device, Meanwhile::compute, {});
}

void HeadGather::finish() {
  if (pending_) pending_->wait();
  copy(unpacking_);
}

std::unique_ptr<Pending> pass_on(Communicator& ring, std::span<const Tensor> mine, std::span<const Tensor> theirs) {
  std::vector<SendBlock> sends;
  std::vector<ReceiveBlock> receives;
  const int last = ring.size() - 1;
  for (const Tensor& tensor : mine) send(sends, ring.rank() == last ? 0 : ring.rank() + 1, tensor);
  for (const Tensor& tensor : theirs) receive(receives, ring.rank() == 0 ? last : ring.rank() - 1, tensor);
  return ring.start(Operation::exchange, sends, receives, mine.front().device());
}

std::unique_ptr<Pending> gather_tokens(Communicator& second, std::span<const TokenCopy> tensors,
                                       std::span<const Range> chunks) {
  std::vector<TokenCopy> copies;
  std::vector<SendBlock> sends;
  std::vector<ReceiveBlock> receives;
  for (const TokenCopy& tensor : tensors) {
    for (std::size_t rank = 0; rank < chunks.size(); ++rank) {
      const Tensor place = slice(tensor.to, 1, chunks[rank]);
      if (rank == place_of(second)) {
        copies.push_back({.to = place, .from = tensor.from});
        continue;
      }
      send(sends, static_cast<int>(rank), tensor.from);
      receive(receives, static_cast<int>(rank), place);
    }
  }
  auto pending = second.start(Operation::all_gather, sends, receives, tensors.front().to.device());
  copy(copies);
  return pending;
}

}  // namespace ditattn::parallel
