// NCCL as a transport: a batch of sends and receives is a group of NCCL's, in a stream of its own. Between GPUs of one
// host that reach each other, copy engines carry what is received in memory that this transport gave.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <set>
#include <utility>

#include "ditattn/cuda.hpp"
#include "ditattn/nccl.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "nccl/id_file.hpp"
#include "nccl/nccl_library.hpp"
#include "nccl/nccl_pending.hpp"
#include "nccl/nccl_state.hpp"
#include "nccl/outgoing.hpp"
#include "nccl/peer_copies.hpp"
#include "nccl/row_copy.hpp"
#include "parallel/timeout.hpp"

namespace ditattn::parallel {
namespace {

using kernels::cuda::check;
using kernels::cuda::OnDevice;
using State = std::shared_ptr<NcclState>;

// What `make` makes, of `parent` where there is one, once it is ready: all of its ranks have come. Kept by the state.
ncclComm_t make_handle(NcclState& state, const char* what, const std::string& text, ncclComm_t parent,
                       const std::function<ncclResult_t(ncclComm_t*)>& make) {
  ncclComm_t handle = nullptr;
  const ncclComm_t& asked = parent != nullptr ? parent : handle;
  try {
    state.call(what, asked, text, [&] { return make(&handle); });
    state.call(what, handle, text, [] { return ncclInProgress; });
  } catch (...) {
    if (handle != nullptr) nccl().comm_abort(handle);
    throw;
  }
  state.keep(handle);
  return handle;
}

class NcclCommunicator final : public Communicator {
 public:
  // `handle` is kept by the state; `ours`: it is ended with this object.
  NcclCommunicator(State state, ncclComm_t handle, int rank, int size, bool ours)
      : Communicator(rank, size, state->timeout()), state_(std::move(state)), handle_(handle), ours_(ours) {
    const OnDevice on_device(state_->device());
    int lowest = 0;
    int highest = 0;
    check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest), "cudaStreamCreate");
  }
  ~NcclCommunicator() override {
    state_->release(handle_, ours_ && !of_graphs_);
    // Poisoned waits end soon. What does not is left to itself, with all that it uses.
    if (peers_ && !drain()) static_cast<void>(new (std::nothrow) std::pair(state_, std::move(peers_)));
    cudaStreamDestroy(stream_);
  }
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  [[nodiscard]] bool takes(DLDevice device) const override {
    return device.device_type == kDLCPU || (device.device_type == kDLCUDA && device.device_id == state_->device());
  }

  void throw_if_failed() override { state_->check(); }

  std::unique_ptr<Pending> start(Operation operation, std::span<const SendBlock> sends,
                                 std::span<const ReceiveBlock> receives, DLDevice device) override {
    check_device(device);
    if (device.device_type == kDLCPU) return start_on_host(operation, sends, receives);
    return start_on_gpu(operation, outgoing(sends), receives, Lane::beside, {});
  }

  // Where nothing is computed meanwhile, the batch is the caller's stream's own work.
  std::unique_ptr<Pending> start_tokens(Operation operation, std::span<const SendTokens> sends,
                                        std::span<const ReceiveBlock> receives, DLDevice device, Meanwhile meanwhile,
                                        std::span<const TokenCopy> copies) override {
    check_device(device);
    if (!peers_ || device.device_type == kDLCPU) {
      return Communicator::start_tokens(operation, sends, receives, device, meanwhile, copies);
    }
    return start_on_gpu(operation, outgoing(sends), receives,
                        meanwhile == Meanwhile::nothing && !has_turn_ ? Lane::in_turn : Lane::beside,
                        row_copies(copies));
  }

  // NCCL's own kernels take multiprocessors: parts of Ulysses cost a third of the whole with them, two H200s, NVLink.
  [[nodiscard]] bool moves_beside_compute(DLDevice device) const override {
    return peers_ != nullptr && device.device_type == kDLCUDA;
  }

  [[nodiscard]] Tensor receive_memory(std::int64_t bytes, DLDevice device) override {
    if (peers_ && device.device_type == kDLCUDA && takes(device)) {
      if (Tensor memory = state_->memory()->allocate(bytes); memory.defined()) return memory;
    }
    return Communicator::receive_memory(bytes, device);
  }

  std::shared_ptr<Communicator> split(int colour, int key) override {
    auto made = split_handle(colour, key);
    made->connect_peers();
    return made;
  }

  // Makes a handle whose operations are begun by the caller's thread, not by one of NCCL's for each, which takes 50 µs
  // more. Nobody would miss a rank in its making and at its first operation, which connects the ranks: so all come
  // together before.
  std::shared_ptr<NcclCommunicator> split_handle(int colour, int key) {
    const OnDevice on_device(state_->device());
    barrier();
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    const std::string text = fmt::format("rank {} of {} waits in ncclCommSplit for another", rank(), size());
    ncclComm_t part = make_handle(*state_, "ncclCommSplit", text, handle_, [&](ncclComm_t* made) {
      return nccl().comm_split(handle_, colour, key, made, &config);
    });
    auto made = of(state_, part, true);
    made->barrier();
    return made;
  }

  // Where copy engines are not used, the others are not told why: they end by their timeout.
  void abort(const std::string& reason) noexcept override {
    state_->fail(false, fmt::format("rank {} failed: {}", rank(), reason));
  }

  // With the others, where the state has memory for it: whether copy engines carry what they can.
  bool connect_peers() {
    peers_ = PeerCopies::make(*this, *state_, stream_);
    return peers_ != nullptr;
  }

  static std::shared_ptr<NcclCommunicator> of(const State& state, ncclComm_t handle, bool ours) {
    int rank = 0;
    int size = 0;
    state->call("ncclCommUserRank", handle, "", [&] { return nccl().comm_user_rank(handle, &rank); });
    state->call("ncclCommCount", handle, "", [&] { return nccl().comm_count(handle, &size); });
    return std::make_shared<NcclCommunicator>(state, handle, rank, size, ours);
  }

 private:
  // Of a batch in the caller's stream: what comes is waited for when it is needed.
  class PendingInTurn;

  void check_device(DLDevice device) const {
    if (takes(device)) return;
    throw NotImplementedError(fmt::format("These ranks exchange memory of the host and of cuda:{}, not of {}.",
                                          state_->device(), device_name(device)));
  }

  std::unique_ptr<Pending> start_on_gpu(Operation operation, std::vector<Outgoing> sends,
                                        std::span<const ReceiveBlock> receives, Lane lane,
                                        const std::vector<kernels::cuda::RowCopy>& copies);

  // NCCL's part of a batch. Returns its end in the stream.
  std::shared_ptr<const Event> call_nccl(Operation operation, const PeerCopies::Left& left, const std::string& text) {
    if (!left.is_empty()) {
      state_->call(operation_name(operation), handle_, text, [&] { return call_nccl(left); });
    }
    return event_in(stream_);
  }

  ncclResult_t call_nccl(const PeerCopies::Left& left) {
    const NcclLibrary& library = nccl();
    ncclResult_t result = library.group_start();
    const auto add = [&](ncclResult_t added) {
      if (result == ncclSuccess && added != ncclInProgress) result = added;
    };
    for (const Outgoing& one : left.sends) {
      add(library.send(one.rows.from, static_cast<std::size_t>(one.bytes), ncclInt8, one.rank, handle_, stream_));
    }
    for (const ReceiveBlock& block : left.receives) {
      add(library.recv(block.data, static_cast<std::size_t>(block.bytes), ncclInt8, block.rank, handle_, stream_));
    }
    const ncclResult_t ended = library.group_end();
    return result == ncclSuccess ? ended : result;
  }

  // Its own stream, and what it has in a caller's.
  bool drain() noexcept try {
    for (const auto start = std::chrono::steady_clock::now();
         std::chrono::steady_clock::now() - start < std::chrono::seconds(5);) {
      if (cudaStreamQuery(stream_) != cudaErrorNotReady && (!last_turn_ || last_turn_->passed())) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  } catch (const std::exception&) {  // the GPU has failed, and goes on with nothing
    return true;
  }

  std::unique_ptr<Pending> start_on_host(Operation operation, std::span<const SendBlock> sends,
                                         std::span<const ReceiveBlock> receives) {
    const OnDevice on_device(state_->device());
    std::int64_t bytes = 0;
    for (const SendBlock& block : sends) bytes += block.bytes;
    for (const ReceiveBlock& block : receives) bytes += block.bytes;
    auto memory = std::make_unique<Staging>(bytes, stream_);
    char* at = memory->data();
    PeerCopies::Left blocks;
    for (const SendBlock& block : sends) {
      check(cudaMemcpyAsync(at, block.data, static_cast<std::size_t>(block.bytes), cudaMemcpyHostToDevice, stream_),
            "cudaMemcpyAsync");
      blocks.sends.push_back(outgoing(SendBlock{block.rank, at, block.bytes}));
      at += block.bytes;
    }
    std::vector<std::pair<ReceiveBlock, const char*>> received;
    for (const ReceiveBlock& block : receives) {
      blocks.receives.push_back({block.rank, at, block.bytes});
      received.emplace_back(block, at);
      at += block.bytes;
    }
    const auto began = event_in(stream_);
    const std::string text = waiting_text(operation, peers_of(blocks.sends, receives));
    auto ended = call_nccl(operation, blocks, text);
    state_->watch({.began = began, .ended = ended, .text = text});
    return std::make_unique<HostPending>(state_, std::move(ended), std::move(memory), std::move(received));
  }

  [[nodiscard]] std::vector<int> peers_of(std::span<const Outgoing> sends,
                                          std::span<const ReceiveBlock> receives) const {
    std::set<int> peers;
    for (const Outgoing& one : sends) peers.insert(one.rank);
    for (const ReceiveBlock& block : receives) peers.insert(block.rank);
    peers.erase(rank());
    return {peers.begin(), peers.end()};
  }

  [[nodiscard]] std::string waiting_text(Operation operation, std::span<const int> peers) const {
    const std::string text = fmt::format("rank {} waits in {}", rank(), operation_name(operation));
    return peers.empty() ? text : fmt::format("{} for rank {}", text, fmt::join(peers, " or "));
  }

  State state_;
  ncclComm_t handle_;
  bool ours_;
  bool of_graphs_ = false;  // whose replays need the handle: NCCL would wait for their end to end it
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<PeerCopies> peers_;       // null: NCCL carries all
  bool has_turn_ = false;                   // a batch in the caller's stream has not been waited for
  std::shared_ptr<const Event> last_turn_;  // how far the last one has been queued, where it is not in a graph
};

class NcclCommunicator::PendingInTurn final : public Pending {
 public:
  struct Work {
    PeerCopies::Batch batch;
    std::shared_ptr<const Event> began;
    std::shared_ptr<const Event> nccl_ended;  // null: NCCL has no part of it
    bool watched;
    std::string text;
  };
  PendingInTurn(NcclCommunicator& communicator, Work work) : communicator_(communicator), work_(std::move(work)) {
    communicator_.has_turn_ = true;
  }

  void wait() override {
    NcclState& state = *communicator_.state_;
    state.check();
    const OnDevice on_device(state.device());
    auto* const stream = static_cast<cudaStream_t>(current_stream({kDLCUDA, state.device()}));
    communicator_.peers_->await(work_.batch, stream);
    communicator_.has_turn_ = false;
    if (work_.nccl_ended) work_.nccl_ended->follow(stream);
    if (!work_.watched) return;
    communicator_.last_turn_ = event_in(stream);
    state.watch({.began = work_.began, .ended = communicator_.last_turn_, .text = work_.text});
  }

 private:
  NcclCommunicator& communicator_;
  Work work_;
};

std::unique_ptr<Pending> NcclCommunicator::start_on_gpu(Operation operation, std::vector<Outgoing> sends,
                                                        std::span<const ReceiveBlock> receives, Lane lane,
                                                        const std::vector<kernels::cuda::RowCopy>& copies) {
  const OnDevice on_device(state_->device());
  auto* const caller = static_cast<cudaStream_t>(current_stream({kDLCUDA, state_->device()}));
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(caller, &capture), "cudaStreamIsCapturing");
  const bool is_recorded = capture != cudaStreamCaptureStatusNone;
  const auto follow_caller = [&] {
    const Event here;
    here.record(caller);
    here.follow(stream_);
  };
  const auto launch_in = [&](cudaStream_t stream) {
    return kernels::cuda::Launch{.device = state_->device(), .stream = stream};
  };
  const bool in_turn = lane == Lane::in_turn;
  if (!in_turn) {
    pack_if([](const Outgoing& one) { return !suits_copy_engines(one); }, sends, launch_in(caller));
    follow_caller();
  }
  cudaStream_t stream = in_turn ? caller : stream_;
  if (in_turn && last_turn_ && !is_recorded) last_turn_->follow(caller);  // which may be another stream than then
  auto began = event_in(stream);
  std::string text = waiting_text(operation, peers_of(sends, receives));
  PeerCopies::Batch batch{.lane = lane, .with = {}};
  PeerCopies::Left left{.sends = {}, .receives = {receives.begin(), receives.end()}};
  if (peers_) {
    state_->check();
    batch = peers_->meet(lane, sends, receives,
                         [&](std::span<const int> missing) { return waiting_text(operation, missing); });
    left = peers_->send(batch, copies, stream);
    if (!in_turn) peers_->await(batch, stream);
    pack_if([](const Outgoing&) { return true; }, left.sends, launch_in(stream));
  } else {
    left.sends = std::move(sends);
  }
  of_graphs_ = of_graphs_ || (is_recorded && !left.is_empty());
  std::shared_ptr<const Event> ended;
  if (in_turn && !left.is_empty()) follow_caller();
  if (!in_turn || !left.is_empty()) ended = call_nccl(operation, left, text);
  if (in_turn) {
    if (!is_recorded) last_turn_ = event_in(caller);
    return std::make_unique<PendingInTurn>(*this, PendingInTurn::Work{.batch = std::move(batch),
                                                                      .began = std::move(began),
                                                                      .nccl_ended = std::move(ended),
                                                                      .watched = !is_recorded,
                                                                      .text = std::move(text)});
  }
  kernels::cuda::copy_rows(copies, launch_in(caller));
  if (!is_recorded) state_->watch({.began = std::move(began), .ended = ended, .text = std::move(text)});
  return std::make_unique<DevicePending>(state_, std::move(ended));
}

// The same ranks by a handle of ours, and by copy engines where they can.
std::shared_ptr<Communicator> world_of(const State& state, NcclCommunicator& ranks) {
  auto world = ranks.split_handle(0, ranks.rank());
  state->set_memory(PeerMemory::join(*world, state->device()));
  if (state->memory() && !world->connect_peers()) {
    PeerMemory::give_up(*world, state->memory());
    state->set_memory(nullptr);
  }
  return world;
}

void check_ranks(int rank, int size, int device, Seconds timeout) {
  const auto devices = static_cast<int>(cuda_info().devices.size());
  if (device < 0 || device >= devices) {
    throw ValueError(fmt::format("There is no cuda:{}: {}.", device,
                                 devices == 0 ? cuda_info().reason : fmt::format("there are {} devices", devices)));
  }
  if (size < 1 || rank < 0 || rank >= size) {
    throw ValueError(fmt::format("There is no rank {} among {}.", rank, size));
  }
  check_timeout(timeout);
  peer_copies_mode();  // is it one?
}

}  // namespace

NcclId nccl_id() {
  ncclUniqueId made;
  const ncclResult_t result = nccl().get_unique_id(&made);
  if (result != ncclSuccess) throw CommunicationError("parallel: " + nccl_error("ncclGetUniqueId", result) + ".");
  NcclId id{};
  static_assert(sizeof(id) == sizeof(made));
  std::memcpy(id.data(), &made, sizeof(made));
  return id;
}

std::shared_ptr<Communicator> nccl_communicator(const NcclId& id, int rank, int size, int device, Seconds timeout) {
  nccl();  // first of all, whether there is one
  check_ranks(rank, size, device, timeout);
  const OnDevice on_device(device);
  const auto state = std::make_shared<NcclState>(device, timeout);
  ncclUniqueId common;
  std::memcpy(&common, id.data(), sizeof(common));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;  // so that a peer that does not come ends by the timeout
  const std::string text = fmt::format("rank {} of {} waits in ncclCommInitRank for another", rank, size);
  ncclComm_t handle = make_handle(*state, "ncclCommInitRank", text, nullptr, [&](ncclComm_t* made) {
    return nccl().comm_init_rank_config(made, size, common, rank, &config);
  });
  return world_of(state, *NcclCommunicator::of(state, handle, true));
}

std::shared_ptr<Communicator> nccl_communicator(const std::filesystem::path& file, int rank, int size, int device,
                                                Seconds timeout) {
  nccl();
  check_ranks(rank, size, device, timeout);
  if (rank != 0) return nccl_communicator(read_id(file, timeout), rank, size, device, timeout);
  const IdFile written(file, nccl_id());
  return nccl_communicator(written.id(), rank, size, device, timeout);
}

std::shared_ptr<Communicator> nccl_communicator(const std::shared_ptr<Communicator>& over, int device) {
  NcclId id{};
  try {
    nccl();
    check_ranks(over->rank(), over->size(), device, over->timeout());
    if (over->rank() == 0) id = nccl_id();
  } catch (const std::exception& error) {
    over->abort(error.what());
    throw;
  }
  std::vector<std::int64_t> bytes(static_cast<std::size_t>(over->size()), 0);
  bytes[0] = sizeof(id);
  const NcclId mine = id;
  over->all_gather(mine.data(), id.data(), bytes)->wait();
  return nccl_communicator(id, over->rank(), over->size(), device, over->timeout());
}

std::shared_ptr<Communicator> nccl_communicator(void* nccl_comm, Seconds timeout) {
  auto* const handle = static_cast<ncclComm_t>(nccl_comm);
  if (handle == nullptr) throw ValueError("nccl_communicator got no ncclComm_t, but null.");
  int device = 0;
  const ncclResult_t result = nccl().comm_cu_device(handle, &device);
  if (result != ncclSuccess) throw ValueError(nccl_error("ncclCommCuDevice", result));
  check_ranks(0, 1, device, timeout);
  const auto state = std::make_shared<NcclState>(device, timeout);
  state->keep(handle);
  return world_of(state, *NcclCommunicator::of(state, handle, false));
}

}  // namespace ditattn::parallel
