// Threads as ranks: mailboxes under one mutex, with one condition variable per rank that waits.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "core/cuda_driver.hpp"
#include "ditattn/communicator.hpp"
#include "ditattn/cuda.hpp"
#include "parallel/error_text.hpp"
#include "parallel/timeout.hpp"

namespace ditattn::parallel {
namespace {

// A copy of what was sent, where it was: in host memory or a GPU's.
struct Message {
  Operation operation;
  Tensor memory;

  [[nodiscard]] std::int64_t bytes() const { return memory.numel(); }
};

Tensor bytes_at(const void* data, std::int64_t bytes, DLDevice device) {
  return wrap(const_cast<void*>(data), {bytes}, kBool, {}, device);
}

// The group's name, who sends, who receives, by their numbers in the world.
using Mailbox = std::tuple<std::string, int, int>;

}  // namespace

struct ThreadWorldState {
  ThreadWorldState(int size, Seconds patience) : timeout(patience), arrived(static_cast<std::size_t>(size)) {}

  void post(const Mailbox& mailbox, Message message) {
    {
      std::lock_guard lock(mutex);
      mail[mailbox].push_back(std::move(message));
    }
    arrived[static_cast<std::size_t>(std::get<2>(mailbox))].notify_one();
  }

  Message take(const Mailbox& mailbox, Operation operation) {
    const auto& [group, from, to] = mailbox;
    std::unique_lock lock(mutex);
    std::deque<Message>& box = mail[mailbox];
    const auto ready = [&] { return failure || !box.empty(); };
    if (!arrived[static_cast<std::size_t>(to)].wait_for(lock, timeout, ready)) {
      const std::string text = fmt::format("rank {} did not come within {} s: it is lost or late (rank {} waits in {})",
                                           from, timeout.count(), to, operation_name(operation));
      fail(text);
      throw TimeoutError("parallel: " + text + ".");
    }
    if (failure) throw CommunicationError("parallel: " + *failure + ".");
    Message message = std::move(box.front());
    box.pop_front();
    return message;
  }

  void abort(const std::string& reason) {
    std::lock_guard lock(mutex);
    fail(reason);
  }

  // Under the mutex. The first reason stays.
  void fail(const std::string& reason) {
    if (!failure) failure = reason;
    for (auto& waiting : arrived) waiting.notify_all();
  }

  const Seconds timeout;
  std::mutex mutex;
  std::vector<std::condition_variable> arrived;  // by receiving rank
  std::map<Mailbox, std::deque<Message>> mail;
  std::optional<std::string> failure;
};

namespace {

using World = std::shared_ptr<ThreadWorldState>;

struct Expected {
  Mailbox mailbox;
  ReceiveBlock block;
};

class ThreadPending final : public Pending {
 public:
  ThreadPending(World world, Operation operation, std::vector<Expected> expected)
      : world_(std::move(world)), operation_(operation), expected_(std::move(expected)) {}

  void wait() override {
    for (const auto& [mailbox, block] : std::exchange(expected_, {})) {
      const Message message = world_->take(mailbox, operation_);
      if (message.operation != operation_ || message.bytes() != block.bytes) {
        const std::string text = fmt::format("rank {} expects {} bytes by {}, rank {} sent {} by {}",
                                             std::get<2>(mailbox), block.bytes, operation_name(operation_),
                                             std::get<1>(mailbox), message.bytes(), operation_name(message.operation));
        world_->abort(text);
        throw CommunicationError("parallel: " + text + ".");
      }
      deliver(message.memory, block);
    }
  }

 private:
  static void deliver(const Tensor& memory, const ReceiveBlock& block) {
    const DLDevice device = memory.device();
    const auto bytes = static_cast<std::size_t>(block.bytes);
    if (device.device_type == kDLCPU) {
      std::memcpy(block.data, memory.data_ptr(), bytes);
    } else {
      cuda::copy(block.data, memory.data_ptr(), bytes, device.device_id, current_stream(device));
      synchronize(device);
    }
  }

  World world_;
  Operation operation_;
  std::vector<Expected> expected_;
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(World world, std::string group, std::vector<int> members, int rank)
      : Communicator(rank, static_cast<int>(members.size()), world->timeout),
        world_(std::move(world)),
        group_(std::move(group)),
        members_(std::move(members)) {}

  [[nodiscard]] bool takes(DLDevice device) const override {
    return device.device_type == kDLCPU || device.device_type == kDLCUDA;
  }

  std::unique_ptr<Pending> start(Operation operation, std::span<const SendBlock> sends,
                                 std::span<const ReceiveBlock> receives, DLDevice device) override {
    if (!takes(device)) {
      throw NotImplementedError(fmt::format(
          "Ranks that are threads exchange memory of the host or of a GPU, not of {}.", device_name(device)));
    }
    std::vector<Tensor> copies;
    for (const SendBlock& block : sends) copies.push_back(copy_to(bytes_at(block.data, block.bytes, device), device));
    synchronize(device);
    for (std::size_t i = 0; i < sends.size(); ++i) {
      world_->post({group_, world_rank(rank()), world_rank(sends[i].rank)}, {operation, copies[i]});
    }
    std::vector<Expected> expected;
    for (const ReceiveBlock& block : receives) {
      expected.push_back({{group_, world_rank(block.rank), world_rank(rank())}, block});
    }
    return std::make_unique<ThreadPending>(world_, operation, std::move(expected));
  }

  std::shared_ptr<Communicator> split(int colour, int key) override {
    const std::array mine = {colour, key};
    std::vector<std::array<int, 2>> all(static_cast<std::size_t>(size()));
    const std::vector<std::int64_t> bytes(all.size(), sizeof(mine));
    all_gather(&mine, all.data(), bytes)->wait();
    std::vector<std::pair<int, int>> chosen;  // key, rank
    for (int peer = 0; peer < size(); ++peer) {
      const auto& [peer_colour, peer_key] = all[static_cast<std::size_t>(peer)];
      if (peer_colour == colour) chosen.emplace_back(peer_key, peer);
    }
    std::ranges::sort(chosen);
    std::vector<int> members;
    members.reserve(chosen.size());
    for (const auto& [peer_key, peer] : chosen) members.push_back(world_rank(peer));
    const auto place = std::ranges::find(members, world_rank(rank())) - members.begin();
    return std::make_shared<ThreadCommunicator>(world_, fmt::format("{}/{}.{}", group_, splits_++, colour), members,
                                                static_cast<int>(place));
  }

  void abort(const std::string& reason) noexcept override {
    world_->abort(fmt::format("rank {} failed: {}", world_rank(rank()), reason));
  }

 private:
  [[nodiscard]] int world_rank(int rank) const { return members_[static_cast<std::size_t>(rank)]; }

  World world_;
  std::string group_;
  std::vector<int> members_;
  int splits_ = 0;
};

// Whether it may be what other ranks get of an error: it then tells less than that.
bool is_consequence(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const CommunicationError&) {
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace

ThreadWorld::ThreadWorld(int size, Seconds timeout) {
  if (size < 1) throw ValueError(fmt::format("A world of {} ranks: it must have at least 1.", size));
  check_timeout(timeout);
  state_ = std::make_shared<ThreadWorldState>(size, timeout);
}

std::shared_ptr<Communicator> ThreadWorld::communicator(int rank) const {
  const auto size = static_cast<int>(state_->arrived.size());
  if (rank < 0 || rank >= size) throw ValueError(fmt::format("There is no rank {} in a world of {}.", rank, size));
  std::vector<int> members(static_cast<std::size_t>(size));
  std::iota(members.begin(), members.end(), 0);
  return std::make_shared<ThreadCommunicator>(state_, "world", std::move(members), rank);
}

void run_ranks(int size, const std::function<void(const std::shared_ptr<Communicator>&)>& body, Seconds timeout) {
  const ThreadWorld world(size, timeout);
  std::mutex mutex;
  std::exception_ptr first;
  const auto run = [&](int rank) {
    const auto communicator = world.communicator(rank);
    try {
      body(communicator);
    } catch (...) {
      const std::exception_ptr error = std::current_exception();
      {
        std::lock_guard lock(mutex);
        if (!first || (is_consequence(first) && !is_consequence(error))) first = error;
      }
      communicator->abort(error_text(error));
    }
  };
  {
    std::vector<std::jthread> threads;
    threads.reserve(static_cast<std::size_t>(size));
    for (int rank = 0; rank < size; ++rank) threads.emplace_back(run, rank);
  }
  if (first) std::rethrow_exception(first);
}

}  // namespace ditattn::parallel
