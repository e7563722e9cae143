#include "nccl/peer_copies.hpp"

#include <cuda.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <utility>

#include "kernels/cuda/launch_impl.hpp"

namespace ditattn::parallel {
namespace {

using Clock = std::chrono::steady_clock;
using kernels::cuda::check;
using kernels::cuda::OnDevice;

constexpr auto kSpinTime = std::chrono::milliseconds(2);
constexpr auto kPollInterval = std::chrono::microseconds(20);

// The driver's functions for a stream's waiting and writing, which CUDA's runtime does not have.
class FlagOperations {
 public:
  FlagOperations() {
    find(wait_, "cuStreamWaitValue32");
    find(write_, "cuStreamWriteValue32");
    find(error_name_, "cuGetErrorName");
  }
  void wait(cudaStream_t stream, std::uintptr_t address, Flag flag) const {
    check_driver(wait_(stream, address, static_cast<cuuint32_t>(flag), CU_STREAM_WAIT_VALUE_AND),
                 "cuStreamWaitValue32");
  }
  // After everything before it, for other GPUs too.
  void write(cudaStream_t stream, std::uintptr_t address, Flag flag) const {
    check_driver(write_(stream, address, static_cast<cuuint32_t>(flag), CU_STREAM_WRITE_VALUE_DEFAULT),
                 "cuStreamWriteValue32");
  }

 private:
  template <class Function>
  static void find(Function& function, const char* name) {
    constexpr unsigned oldest = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion(name, &found, oldest, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    if (found == nullptr) throw std::runtime_error(fmt::format("the NVIDIA driver has no {}", name));
    function = reinterpret_cast<Function>(found);
  }
  void check_driver(CUresult result, const char* what) const {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    error_name_(result, &name);
    throw std::runtime_error(fmt::format("{} failed: {}", what, name != nullptr ? name : "unknown error"));
  }

  decltype(&cuStreamWaitValue32) wait_ = nullptr;
  decltype(&cuStreamWriteValue32) write_ = nullptr;
  decltype(&cuGetErrorName) error_name_ = nullptr;
};

const FlagOperations& flags() {
  static const FlagOperations instance;
  return instance;
}

bool is_open(const Destination& destination) { return destination.offset >= 0; }
bool has_open(const std::vector<Destination>& all) { return std::ranges::any_of(all, is_open); }

}  // namespace

std::unique_ptr<PeerCopies> PeerCopies::make(Communicator& over, NcclState& state, cudaStream_t stream) {
  if (over.size() == 1 || !state.memory()) return nullptr;
  const OnDevice on_device(state.device());
  std::shared_ptr<PeerPage> page;
  PeerPage::Ticket ticket{};
  auto problem = first_problem(over, [&] {
    if (over.rank() != 0) return;
    page = std::make_shared<PeerPage>(0, over.size());
    ticket = page->ticket();
  });
  if (!problem) {
    ticket = gather(over, ticket).front();
    std::unique_ptr<PeerCopies> made;
    problem = first_problem(over, [&] {
      if (over.rank() != 0) page = std::make_shared<PeerPage>(over.rank(), over.size(), ticket);
      made = std::make_unique<PeerCopies>(over.rank(), over.size(), state, page);
      made->test_flags(stream);
    });
    if (over.rank() == 0) page->close_file();
    if (!problem) {
      state.memory()->set_page(page);
      return made;
    }
  }
  if (peer_copies_mode() != PeerCopiesMode::on) return nullptr;
  throw NotImplementedError(
      fmt::format("DITATTN_PEER_COPIES is 'on', and these ranks cannot share memory. {}.", *problem));
}

PeerCopies::PeerCopies(int rank, int size, NcclState& state, std::shared_ptr<PeerPage> page)
    : rank_(rank), size_(size), state_(state), page_(std::move(page)) {
  state_.keep(page_);
}

PeerCopies::~PeerCopies() { state_.release(page_); }

// With the flag of this rank to itself, which nothing else uses.
void PeerCopies::test_flags(cudaStream_t stream) {
  const std::uintptr_t own = page_->flag(rank_, rank_);
  flags().write(stream, own, Flag::ready);
  flags().wait(stream, own, Flag::ready);
  flags().write(stream, own, Flag::full);
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  if (page_->flag_value(rank_, rank_) != static_cast<std::uint32_t>(Flag::full)) {
    throw std::runtime_error("what the GPU writes into the ranks' memory does not come there");
  }
}

PeerCopies::Left PeerCopies::queue(std::span<const SendBlock> sends, std::span<const ReceiveBlock> receives,
                                   cudaStream_t stream, const WaitingText& text) {
  AllTraffic all(static_cast<std::size_t>(size_));
  for (const SendBlock& block : sends) {
    if (block.bytes > 0) all[static_cast<std::size_t>(block.rank)].sends.push_back(block);
  }
  for (const ReceiveBlock& block : receives) {
    if (block.bytes == 0) continue;
    Traffic& traffic = all[static_cast<std::size_t>(block.rank)];
    traffic.receives.push_back(block);
    traffic.at.push_back(state_.memory()->locate(block.data, block.bytes));
  }
  meet(all, text);

  Left left;
  // Each rank begins with the one after it, so that not all write to the same one.
  const auto for_each_peer = [&](int direction, const auto& body) {
    for (int distance = 1; distance < size_; ++distance) {
      const int peer = (rank_ + direction * distance + size_) % size_;
      body(peer, all[static_cast<std::size_t>(peer)]);
    }
  };
  for_each_peer(-1, [&](int peer, const Traffic& traffic) {
    if (has_open(traffic.at)) flags().write(stream, page_->flag(peer, rank_), Flag::ready);
  });
  copy_own(all[static_cast<std::size_t>(rank_)], stream);
  for_each_peer(1, [&](int peer, const Traffic& traffic) {
    if (has_open(traffic.to)) flags().wait(stream, page_->flag(rank_, peer), Flag::ready);
    for (std::size_t i = 0; i < traffic.sends.size(); ++i) {
      const SendBlock& block = traffic.sends[i];
      if (!is_open(traffic.to[i])) {
        left.sends.push_back(block);
        continue;
      }
      check(cudaMemcpyAsync(state_.memory()->open(traffic.to[i]), block.data, static_cast<std::size_t>(block.bytes),
                            cudaMemcpyDeviceToDevice, stream),
            "cudaMemcpyAsync");
    }
    if (has_open(traffic.to)) flags().write(stream, page_->flag(rank_, peer), Flag::full);
  });
  for_each_peer(-1, [&](int peer, const Traffic& traffic) {
    if (has_open(traffic.at)) flags().wait(stream, page_->flag(peer, rank_), Flag::full);
    for (std::size_t i = 0; i < traffic.receives.size(); ++i) {
      if (!is_open(traffic.at[i])) left.receives.push_back(traffic.receives[i]);
    }
  });
  return left;
}

// Tells the others where this rank receives, and hears where they do.
void PeerCopies::meet(AllTraffic& all, const WaitingText& text) {
  for (auto start = Clock::now();;) {
    std::vector<int> missing;
    bool moved = false;
    for (int peer = 0; peer < size_; ++peer) {
      Traffic& traffic = all[static_cast<std::size_t>(peer)];
      if (peer == rank_) continue;
      moved = meet_one(peer, traffic) || moved;
      if (traffic.posted < traffic.receives.size() || traffic.to.size() < traffic.sends.size()) missing.push_back(peer);
    }
    if (missing.empty()) return;
    if (moved) start = Clock::now();
    state_.check();
    const auto waited = Clock::now() - start;
    if (waited > state_.timeout()) {
      state_.fail_late(text(missing));
      state_.check();
    }
    waited < kSpinTime ? std::this_thread::yield() : std::this_thread::sleep_for(kPollInterval);
  }
}

// Whether anything came of it.
bool PeerCopies::meet_one(int peer, Traffic& traffic) {
  bool moved = false;
  for (; traffic.posted < traffic.at.size() && page_->post(peer, traffic.at[traffic.posted]); ++traffic.posted) {
    moved = true;
  }
  while (traffic.to.size() < traffic.sends.size()) {
    const auto destination = page_->take(peer);
    if (!destination) break;
    const std::int64_t bytes = traffic.sends[traffic.to.size()].bytes;
    if (destination->bytes != bytes) {
      state_.fail(false, fmt::format("rank {} expects {} bytes of rank {}, which sends {}", peer, destination->bytes,
                                     rank_, bytes));
      state_.check();
    }
    traffic.to.push_back(*destination);
    moved = true;
  }
  return moved;
}

void PeerCopies::copy_own(const Traffic& own, cudaStream_t stream) const {
  for (std::size_t i = 0; i < std::min(own.sends.size(), own.receives.size()); ++i) {
    check(cudaMemcpyAsync(own.receives[i].data, own.sends[i].data, static_cast<std::size_t>(own.sends[i].bytes),
                          cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
  }
}

}  // namespace ditattn::parallel
