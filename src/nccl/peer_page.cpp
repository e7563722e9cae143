#include "nccl/peer_page.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/peer_exchange.hpp"

namespace ditattn::parallel {
namespace {

using kernels::cuda::check;

constexpr std::size_t kLine = 64;
constexpr std::uint64_t kPosts = 16;  // of a mailbox; more wait for their turn
enum : int { nobody, writing, written };

struct alignas(kLine) Word {
  std::atomic<std::uint32_t> value;
};

// Of one rank, for another that sends to it.
struct Mailbox {
  alignas(kLine) std::atomic<std::uint64_t> posted;
  alignas(kLine) std::atomic<std::uint64_t> taken;
  std::array<Destination, kPosts> destinations;
};

struct Member {
  std::atomic<pid_t> process;
  std::atomic<bool> has_left;
};

std::runtime_error system_error(const std::string& what) {
  return std::runtime_error(fmt::format("{}: {}", what, std::strerror(errno)));
}

}  // namespace

// Zero at first, which is a state of each.
struct PeerPage::Layout {
  static constexpr int kMostRanks = kernels::cuda::kMostPeers;

  std::atomic<std::uint64_t> number;
  std::atomic<int> failed;
  bool late;
  std::array<char, 512> reason;
  std::array<Member, kMostRanks> members;
  // Behind it: flags, then mailboxes, of all pairs.

  Word* flags() { return reinterpret_cast<Word*>(reinterpret_cast<char*>(this) + offset_of_flags()); }
  Mailbox* mailboxes(int ranks) { return reinterpret_cast<Mailbox*>(flags() + pairs_of(ranks)); }
  static std::size_t pairs_of(int ranks) { return static_cast<std::size_t>(ranks) * static_cast<std::size_t>(ranks); }
  static std::size_t offset_of_flags() { return (sizeof(Layout) + kLine - 1) / kLine * kLine; }
  static std::size_t bytes(int ranks) { return offset_of_flags() + pairs_of(ranks) * (sizeof(Word) + sizeof(Mailbox)); }
};

PeerPage::PeerPage(int rank, int ranks) : rank_(rank), ranks_(ranks), bytes_(Layout::bytes(ranks)) {
  if (ranks > Layout::kMostRanks) throw std::runtime_error(fmt::format("{} ranks on one host", ranks));
  file_ = ::memfd_create("ditattn", MFD_CLOEXEC);
  if (file_ < 0) throw system_error("memfd_create");
  try {
    if (::ftruncate(file_, static_cast<off_t>(bytes_)) != 0) throw system_error("ftruncate");
    map(file_);
    std::random_device random;
    layout_->number = (std::uint64_t{random()} << 32U | random()) | 1U;
    attach_gpu();
  } catch (...) {
    if (layout_ != nullptr) ::munmap(layout_, bytes_);
    close_file();
    throw;
  }
}

PeerPage::PeerPage(int rank, int ranks, const Ticket& ticket)
    : rank_(rank), ranks_(ranks), bytes_(Layout::bytes(ranks)) {
  const std::string name = fmt::format("/proc/{}/fd/{}", ticket.process, ticket.file);
  const int file = ::open(name.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) throw system_error(name);
  try {
    struct stat found {};
    if (::fstat(file, &found) != 0 || std::cmp_not_equal(found.st_size, bytes_)) {
      throw std::runtime_error(name + " is another rank's on another host");
    }
    map(file);
    if (layout_->number != ticket.number) throw std::runtime_error(name + " is another rank's on another host");
    attach_gpu();
    ::close(file);
  } catch (...) {
    if (layout_ != nullptr) ::munmap(layout_, bytes_);
    ::close(file);
    throw;
  }
}

PeerPage::~PeerPage() {
  cudaHostUnregister(layout_);
  ::munmap(layout_, bytes_);
  close_file();
}

void PeerPage::map(int file) {
  void* memory = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) throw system_error("mmap");
  layout_ = static_cast<Layout*>(memory);
}

void PeerPage::attach_gpu() {
  check(cudaHostRegister(layout_, bytes_, cudaHostRegisterMapped | cudaHostRegisterPortable), "cudaHostRegister");
  void* address = nullptr;
  const cudaError_t found = cudaHostGetDevicePointer(&address, layout_, 0);
  if (found != cudaSuccess) cudaHostUnregister(layout_);
  check(found, "cudaHostGetDevicePointer");
  on_gpu_ = static_cast<char*>(address);
  layout_->members[static_cast<std::size_t>(rank_)].process = ::getpid();
}

PeerPage::Ticket PeerPage::ticket() const { return {::getpid(), file_, layout_->number}; }

void PeerPage::close_file() {
  if (file_ >= 0) ::close(std::exchange(file_, -1));
}

bool PeerPage::post(int from, const Destination& destination) {
  Mailbox& box = layout_->mailboxes(ranks_)[rank_ * ranks_ + from];
  const std::uint64_t posted = box.posted.load(std::memory_order_relaxed);
  if (posted - box.taken.load(std::memory_order_acquire) == kPosts) return false;
  box.destinations[posted % kPosts] = destination;
  box.posted.store(posted + 1, std::memory_order_release);
  return true;
}

std::optional<Destination> PeerPage::take(int to) {
  Mailbox& box = layout_->mailboxes(ranks_)[to * ranks_ + rank_];
  const std::uint64_t taken = box.taken.load(std::memory_order_relaxed);
  if (taken == box.posted.load(std::memory_order_acquire)) return std::nullopt;
  const Destination destination = box.destinations[taken % kPosts];
  box.taken.store(taken + 1, std::memory_order_release);
  return destination;
}

const char* PeerPage::flag_on_gpu(int from, int to) const {
  const auto* word = reinterpret_cast<const char*>(layout_->flags() + (from * ranks_ + to));
  return on_gpu_ + (word - reinterpret_cast<const char*>(layout_));
}

std::uintptr_t PeerPage::flag(int from, int to) const {
  return reinterpret_cast<std::uintptr_t>(flag_on_gpu(from, to));
}

const std::uint32_t* PeerPage::own_flag() const {
  return reinterpret_cast<const std::uint32_t*>(flag_on_gpu(rank_, rank_));
}

std::uint32_t PeerPage::flag_value(int from, int to) const { return layout_->flags()[from * ranks_ + to].value; }

void PeerPage::fail(const PeerFailure& failure) {
  int before = nobody;
  if (!layout_->failed.compare_exchange_strong(before, writing)) return;
  layout_->late = failure.late;
  const std::size_t length = std::min(failure.text.size(), layout_->reason.size() - 1);
  std::memcpy(layout_->reason.data(), failure.text.data(), length);
  layout_->reason[length] = '\0';
  layout_->failed.store(written, std::memory_order_release);
}

// One that is being written counts already: flags may be poisoned. Its rank may have died over it.
std::optional<PeerFailure> PeerPage::failure() const {
  const auto state = [&] { return layout_->failed.load(std::memory_order_acquire); };
  if (state() == nobody) return std::nullopt;
  for (int look = 0; look < 1000 && state() != written; ++look) std::this_thread::yield();
  if (state() != written) return PeerFailure{.late = false, .text = "another rank gave up"};
  return PeerFailure{.late = layout_->late, .text = layout_->reason.data()};
}

void PeerPage::poison() {
  for (int peer = 0; peer < ranks_; ++peer) {
    for (const int word : {rank_ * ranks_ + peer, peer * ranks_ + rank_}) {
      layout_->flags()[word].value = static_cast<std::uint32_t>(Flag::poison);
    }
  }
}

void PeerPage::leave() { layout_->members[static_cast<std::size_t>(rank_)].has_left = true; }

bool PeerPage::have_all_left() const {
  return std::all_of(layout_->members.begin(), layout_->members.begin() + ranks_, [](const Member& member) {
    return member.has_left || (::kill(member.process, 0) != 0 && errno == ESRCH);
  });
}

}  // namespace ditattn::parallel
