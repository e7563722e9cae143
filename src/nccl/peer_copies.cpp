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
using kernels::cuda::RowCopy;

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

std::uint64_t bit(int rank) { return std::uint64_t{1} << static_cast<unsigned>(rank); }

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
      made->clear_words(stream);
    });
    if (!problem) {
      const auto words = gather(over, made->words_destination());
      problem = first_problem(over, [&] { made->reach_words(words); });
    }
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

// In memory that the others open.
void PeerCopies::clear_words(cudaStream_t stream) {
  static_assert(kernels::cuda::kPeerPoison == static_cast<std::uint32_t>(Flag::poison));
  words_memory_ = state_.memory()->allocate(kernels::cuda::kPeerWordsBytes);
  if (!words_memory_.defined()) throw std::runtime_error("the GPU has no memory left");
  words_.here = static_cast<std::uint32_t*>(words_memory_.data_ptr());
  words_.poison = page_->own_flag();
  words_.rank = rank_;
  check(cudaMemsetAsync(words_.here, 0, kernels::cuda::kPeerWordsBytes, stream), "cudaMemsetAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

Destination PeerCopies::words_destination() const {
  return state_.memory()->locate(words_.here, kernels::cuda::kPeerWordsBytes);
}

void PeerCopies::reach_words(std::span<const Destination> theirs) {
  for (int rank = 0; rank < size_; ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    if (rank != rank_) words_.there[at] = reinterpret_cast<std::uint32_t*>(state_.memory()->open(theirs[at]));
  }
}

// Tells the others where this rank receives, and hears where they do.
PeerCopies::Batch PeerCopies::meet(Lane lane, const std::vector<Outgoing>& sends,
                                   std::span<const ReceiveBlock> receives, const WaitingText& text) {
  Batch batch{.lane = lane, .with = std::vector<Traffic>(static_cast<std::size_t>(size_))};
  for (const Outgoing& one : sends) batch.with[static_cast<std::size_t>(one.rank)].sends.push_back(one);
  for (const ReceiveBlock& block : receives) {
    if (block.bytes == 0) continue;
    Traffic& traffic = batch.with[static_cast<std::size_t>(block.rank)];
    traffic.receives.push_back(block);
    traffic.at.push_back(state_.memory()->locate(block.data, block.bytes));
  }
  for (auto start = Clock::now();;) {
    std::vector<int> missing;
    bool moved = false;
    for (int peer = 0; peer < size_; ++peer) {
      Traffic& traffic = batch.with[static_cast<std::size_t>(peer)];
      if (peer == rank_) continue;
      moved = meet_one(peer, traffic) || moved;
      if (traffic.posted < traffic.receives.size() || traffic.to.size() < traffic.sends.size()) missing.push_back(peer);
    }
    if (missing.empty()) return batch;
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

template <class Body>
void PeerCopies::for_each_peer(const Batch& batch, int direction, const Body& body) const {
  for (int distance = 1; distance < size_; ++distance) {
    const int peer = (rank_ + direction * distance + size_) % size_;
    body(peer, batch.with[static_cast<std::size_t>(peer)]);
  }
}

PeerCopies::Left PeerCopies::send(const Batch& batch, std::span<const RowCopy> copies, cudaStream_t stream) {
  batch.lane == Lane::in_turn ? send_by_kernel(batch, copies, stream) : send_by_engines(batch, stream);
  Left left;
  for_each_peer(batch, 1, [&](int, const Traffic& traffic) {
    for (std::size_t i = 0; i < traffic.sends.size(); ++i) {
      if (!is_open(traffic.to[i])) left.sends.push_back(traffic.sends[i]);
    }
    for (std::size_t i = 0; i < traffic.receives.size(); ++i) {
      if (!is_open(traffic.at[i])) left.receives.push_back(traffic.receives[i]);
    }
  });
  return left;
}

void PeerCopies::send_by_engines(const Batch& batch, cudaStream_t stream) {
  for_each_peer(batch, -1, [&](int peer, const Traffic& traffic) {
    if (has_open(traffic.at)) flags().write(stream, page_->flag(peer, rank_), Flag::ready);
  });
  copy_own(batch.with[static_cast<std::size_t>(rank_)], stream);
  for_each_peer(batch, 1, [&](int peer, const Traffic& traffic) {
    if (!has_open(traffic.to)) return;
    const std::uintptr_t flag = page_->flag(rank_, peer);
    flags().wait(stream, flag, Flag::ready);
    for (std::size_t i = 0; i < traffic.sends.size(); ++i) {
      if (is_open(traffic.to[i])) copy_by_engine(traffic.sends[i], state_.memory()->open(traffic.to[i]), stream);
    }
    flags().write(stream, flag, Flag::full);
  });
}

void PeerCopies::send_by_kernel(const Batch& batch, std::span<const RowCopy> copies, cudaStream_t stream) {
  std::vector<RowCopy> there;
  std::uint64_t to = 0;
  for_each_peer(batch, 1, [&](int peer, const Traffic& traffic) {
    if (has_open(traffic.to)) to |= bit(peer);
    for (std::size_t i = 0; i < traffic.sends.size(); ++i) {
      if (is_open(traffic.to[i])) there.push_back(traffic.sends[i].copy_to(state_.memory()->open(traffic.to[i])));
    }
  });
  kernels::cuda::exchange_rows(there, copies, words_, to, comes_from(batch),
                               {.device = state_.device(), .stream = stream});
}

// Whose blocks come straight into this rank's memory.
std::uint64_t PeerCopies::comes_from(const Batch& batch) const {
  std::uint64_t from = 0;
  for_each_peer(batch, 1, [&](int peer, const Traffic& traffic) { from |= has_open(traffic.at) ? bit(peer) : 0; });
  return from;
}

void PeerCopies::await(const Batch& batch, cudaStream_t stream) const {
  if (batch.lane == Lane::in_turn) {
    if (const std::uint64_t from = comes_from(batch); from != 0) {
      kernels::cuda::await_rows(words_, from, {.device = state_.device(), .stream = stream});
    }
    return;
  }
  for_each_peer(batch, -1, [&](int peer, const Traffic& traffic) {
    if (has_open(traffic.at)) flags().wait(stream, page_->flag(peer, rank_), Flag::full);
  });
}

void PeerCopies::copy_own(const Traffic& own, cudaStream_t stream) const {
  for (std::size_t i = 0; i < std::min(own.sends.size(), own.receives.size()); ++i) {
    copy_by_engine(own.sends[i], static_cast<char*>(own.receives[i].data), stream);
  }
}

}  // namespace ditattn::parallel
