#include "nccl/peer_memory.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include "core/environment.hpp"
#include "core/text.hpp"
#include "kernels/cuda/launch_impl.hpp"

namespace ditattn::parallel {
namespace {

using kernels::cuda::check;
using kernels::cuda::OnDevice;

constexpr std::int64_t kGranularity = std::int64_t{2} << 20;  // of cudaMalloc

// What a rank tells the others.
struct Card {
  PeerCopiesMode mode;
  pid_t process;
  cudaUUID_t gpu;
  cudaIpcMemHandle_t memory;
};

// Calls that no graph records, while one may be recorded.
class OutsideGraphs {
 public:
  OutsideGraphs() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideGraphs() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideGraphs(const OutsideGraphs&) = delete;
  OutsideGraphs& operator=(const OutsideGraphs&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

void check_reach(int device, const Card& peer) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  for (int other = 0; other < devices; ++other) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, other), "cudaGetDeviceProperties");
    if (std::memcmp(&properties.uuid, &peer.gpu, sizeof(peer.gpu)) != 0) continue;
    int reaches = 0;
    check(cudaDeviceCanAccessPeer(&reaches, device, other), "cudaDeviceCanAccessPeer");
    if (other == device) throw std::runtime_error(fmt::format("cuda:{} is another rank's too", device));
    if (reaches == 0) throw std::runtime_error(fmt::format("cuda:{} has no peer access to cuda:{}", device, other));
    return;
  }
  throw std::runtime_error(fmt::format("another rank's GPU is not visible beside cuda:{}", device));
}

// Memory of those that are no more, which others may still have open.
struct LeftBehind {
  int device;
  std::vector<char*> blocks;
  std::shared_ptr<PeerPage> page;
};
struct AllLeftBehind {
  std::mutex mutex;
  std::vector<LeftBehind> all;
};
AllLeftBehind& left_behind() {
  static auto& instance = *new AllLeftBehind;  // the driver may end before static objects do
  return instance;
}

}  // namespace

PeerCopiesMode peer_copies_mode() {
  const std::string text = environment(Env::DITATTN_PEER_COPIES).value_or("auto");
  const std::string mode = upper_case(text);
  if (mode == "AUTO") return PeerCopiesMode::automatic;
  if (mode == "ON") return PeerCopiesMode::on;
  if (mode == "OFF") return PeerCopiesMode::off;
  throw ValueError(fmt::format("DITATTN_PEER_COPIES is '{}'. Valid values are: auto, on, off", text));
}

std::optional<std::string> first_problem(Communicator& ranks, const std::function<void()>& body) {
  std::array<char, 256> mine{};
  try {
    body();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::memcpy(mine.data(), text.data(), std::min(text.size(), mine.size() - 1));
    mine[0] = text.empty() ? '?' : mine[0];
  }
  const auto all = gather(ranks, mine);
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank][0] != '\0') return fmt::format("rank {}: {}", rank, all[rank].data());
  }
  return std::nullopt;
}

std::shared_ptr<PeerMemory> PeerMemory::join(Communicator& world, int device) {
  if (world.size() == 1) return nullptr;
  Card mine{.mode = peer_copies_mode(), .process = ::getpid(), .gpu = {}, .memory = {}};
  std::shared_ptr<PeerMemory> memory;
  auto problem = first_problem(world, [&] {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    mine.gpu = properties.uuid;
    if (mine.mode == PeerCopiesMode::off) return;
    memory = std::make_shared<PeerMemory>(device);
    mine.memory = memory->locate(memory->allocate(1).data_ptr(), 1).memory;
  });
  const auto cards = gather(world, mine);
  const auto is = [](PeerCopiesMode mode) { return [mode](const Card& card) { return card.mode == mode; }; };
  if (std::ranges::any_of(cards, is(PeerCopiesMode::off))) return nullptr;
  if (!problem) {
    problem = first_problem(world, [&] {
      for (int rank = 0; rank < world.size(); ++rank) {
        const Card& card = cards[static_cast<std::size_t>(rank)];
        if (rank == world.rank()) continue;
        if (card.process == mine.process) throw std::runtime_error(fmt::format("rank {} is this process too", rank));
        check_reach(device, card);
        static_cast<void>(memory->open({.memory = card.memory, .offset = 0, .bytes = 1}));
      }
    });
  }
  if (!problem) return memory;
  give_up(world, std::move(memory));
  if (std::ranges::any_of(cards, is(PeerCopiesMode::on))) {
    throw NotImplementedError(
        fmt::format("DITATTN_PEER_COPIES is 'on', and these GPUs cannot copy into each other's memory. {}.", *problem));
  }
  return nullptr;
}

void PeerMemory::give_up(Communicator& world, std::shared_ptr<PeerMemory> memory) {
  if (memory) memory->close_all();
  world.barrier();
}

PeerMemory::PeerMemory(int device) : device_(device) { free_what_all_have_left(); }

PeerMemory::~PeerMemory() {
  try {
    const OnDevice on_device(device_);
    close_all();
    LeftBehind mine{.device = device_, .blocks = {}, .page = page_};
    for (const Block& block : blocks_) mine.blocks.push_back(block.data);
    if (page_) page_->leave();
    {
      const std::lock_guard lock(left_behind().mutex);
      left_behind().all.push_back(std::move(mine));
    }
    free_what_all_have_left();
  } catch (const std::exception&) {  // the driver is gone, and the memory with it
  }
}

void PeerMemory::close_all() noexcept {
  for (const auto& [name, data] : opened_) cudaIpcCloseMemHandle(data);
  opened_.clear();
}

void PeerMemory::free_what_all_have_left() {
  const std::lock_guard lock(left_behind().mutex);
  std::erase_if(left_behind().all, [](const LeftBehind& one) {
    if (one.page && !one.page->have_all_left()) return false;
    const OnDevice on_device(one.device);
    for (char* block : one.blocks) cudaFree(block);
    return true;
  });
}

// Gives a block back with the tensor that has it.
class PeerMemory::Lent {
 public:
  Lent(std::shared_ptr<PeerMemory> memory, char* data) : memory_(std::move(memory)), data_(data) {}
  void AllocData(DLTensor* tensor) const { tensor->data = data_; }
  void FreeData(DLTensor* tensor) { memory_->give_back(tensor->data); }

 private:
  std::shared_ptr<PeerMemory> memory_;
  char* data_;
};

Tensor PeerMemory::allocate(std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  Block* block = find_free(bytes);
  if (block == nullptr) {
    const OnDevice on_device(device_);
    const OutsideGraphs outside;
    const std::int64_t size = std::max<std::int64_t>((bytes + kGranularity - 1) / kGranularity, 1) * kGranularity;
    void* data = nullptr;
    const cudaError_t status = cudaMalloc(&data, static_cast<std::size_t>(size));
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return {};
    }
    check(status, "cudaMalloc");
    Block made{.data = static_cast<char*>(data), .bytes = size, .handle = {}, .is_used = false};
    const cudaError_t exported = cudaIpcGetMemHandle(&made.handle, data);
    if (exported != cudaSuccess) cudaFree(data);
    check(exported, "cudaIpcGetMemHandle");
    block = &blocks_.emplace_back(made);
  }
  block->is_used = true;
  return Tensor::FromNDAlloc(Lent(shared_from_this(), block->data), tvm::ffi::ShapeView(&bytes, 1), kBool,
                             {kDLCUDA, device_});
}

// The smallest that is large enough, and not wasted on so little.
PeerMemory::Block* PeerMemory::find_free(std::int64_t bytes) {
  Block* best = nullptr;
  for (Block& block : blocks_) {
    if (block.is_used || block.bytes < bytes || block.bytes > std::max(4 * bytes, kGranularity)) continue;
    if (best == nullptr || block.bytes < best->bytes) best = &block;
  }
  return best;
}

void PeerMemory::give_back(const void* data) noexcept {
  const std::lock_guard lock(mutex_);
  for (Block& block : blocks_) {
    if (block.data == data) block.is_used = false;
  }
}

Destination PeerMemory::locate(const void* data, std::int64_t bytes) const {
  const std::lock_guard lock(mutex_);
  const auto* at = static_cast<const char*>(data);
  for (const Block& block : blocks_) {
    if (std::less_equal<>()(block.data, at) && std::less_equal<>()(at + bytes, block.data + block.bytes)) {
      return {.memory = block.handle, .offset = at - block.data, .bytes = bytes};
    }
  }
  return {.memory = {}, .offset = -1, .bytes = bytes};
}

char* PeerMemory::open(const Destination& destination) {
  Name name{};
  std::memcpy(name.data(), &destination.memory, name.size());
  const std::lock_guard lock(mutex_);
  auto found = opened_.find(name);
  if (found == opened_.end()) {
    const OnDevice on_device(device_);
    const OutsideGraphs outside;
    void* data = nullptr;
    check(cudaIpcOpenMemHandle(&data, destination.memory, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    found = opened_.emplace(name, static_cast<char*>(data)).first;
  }
  return found->second + destination.offset;
}

}  // namespace ditattn::parallel
