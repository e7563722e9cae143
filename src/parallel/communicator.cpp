// What every transport has: collective operations as batches of sends and receives.

#include "ditattn/communicator.hpp"

#include <array>
#include <vector>

#include "parallel/tokens.hpp"

namespace ditattn::parallel {
namespace {

void add(std::vector<SendBlock>& blocks, int rank, const void* data, std::int64_t bytes) {
  if (bytes > 0) blocks.push_back({rank, data, bytes});
}
void add(std::vector<ReceiveBlock>& blocks, int rank, void* data, std::int64_t bytes) {
  if (bytes > 0) blocks.push_back({rank, data, bytes});
}

// Blocks of these sizes, one after the other.
template <class Block, class Data>
std::vector<Block> blocks_of(Data* data, std::span<const std::int64_t> bytes) {
  using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
  std::vector<Block> blocks;
  auto* at = static_cast<Byte*>(data);
  for (std::size_t rank = 0; rank < bytes.size(); ++rank) {
    add(blocks, static_cast<int>(rank), at, bytes[rank]);
    at += bytes[rank];
  }
  return blocks;
}

}  // namespace

Pending::~Pending() = default;
Communicator::~Communicator() = default;

std::string_view operation_name(Operation operation) {
  switch (operation) {
    case Operation::all_to_all:
      return "all_to_all";
    case Operation::exchange:
      return "exchange";
    case Operation::all_gather:
      return "all_gather";
    case Operation::barrier:
      return "barrier";
  }
  return "unknown";
}

Tensor Communicator::receive_memory(std::int64_t bytes, DLDevice device) {
  return empty(std::array{bytes}, kBool, device);
}

std::unique_ptr<Pending> Communicator::start_tokens(Operation operation, std::span<const SendTokens> sends,
                                                    std::span<const ReceiveBlock> receives, DLDevice device,
                                                    Meanwhile /*meanwhile*/, std::span<const TokenCopy> copies) {
  std::vector<SendBlock> blocks;
  std::vector<TokenCopy> packing;
  for (const SendTokens& send : sends) {
    blocks.push_back({send.rank, send.packed, bytes_of(send.tokens)});
    if (send.packed == data_pointer(send.tokens)) continue;
    packing.push_back({.to = token_major_like(send.tokens, send.packed), .from = send.tokens});
  }
  copy(packing);
  auto pending = start(operation, blocks, receives, device);
  copy(copies);
  return pending;
}

std::unique_ptr<Pending> Communicator::all_to_all(const void* send, std::span<const std::int64_t> send_bytes,
                                                  void* receive, std::span<const std::int64_t> receive_bytes,
                                                  DLDevice device) {
  return start(Operation::all_to_all, blocks_of<SendBlock>(send, send_bytes),
               blocks_of<ReceiveBlock>(receive, receive_bytes), device);
}

std::unique_ptr<Pending> Communicator::exchange(const SendBlock& send, const ReceiveBlock& receive, DLDevice device) {
  std::vector<SendBlock> sends;
  std::vector<ReceiveBlock> receives;
  add(sends, send.rank, send.data, send.bytes);
  add(receives, receive.rank, receive.data, receive.bytes);
  return start(Operation::exchange, sends, receives, device);
}

std::unique_ptr<Pending> Communicator::all_gather(const void* send, void* receive, std::span<const std::int64_t> bytes,
                                                  DLDevice device) {
  std::vector<SendBlock> sends;
  for (int rank = 0; rank < size_; ++rank) add(sends, rank, send, bytes[static_cast<std::size_t>(rank_)]);
  return start(Operation::all_gather, sends, blocks_of<ReceiveBlock>(receive, bytes), device);
}

void Communicator::barrier() {
  const char mine = 0;
  std::vector<char> theirs(static_cast<std::size_t>(size_));
  std::vector<SendBlock> sends;
  std::vector<ReceiveBlock> receives;
  for (int rank = 0; rank < size_; ++rank) {
    add(sends, rank, &mine, 1);
    add(receives, rank, &theirs[static_cast<std::size_t>(rank)], 1);
  }
  start(Operation::barrier, sends, receives, kCpu)->wait();
}

}  // namespace ditattn::parallel
