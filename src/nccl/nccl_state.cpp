#include "nccl/nccl_state.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <ranges>
#include <utility>

#include "kernels/cuda/launch_impl.hpp"
#include "nccl/nccl_library.hpp"

namespace ditattn::parallel {
namespace {

using Clock = std::chrono::steady_clock;
using kernels::cuda::check;
using kernels::cuda::OnDevice;

constexpr auto kSpinTime = std::chrono::milliseconds(2);  // to begin an operation takes NCCL some 20 µs
constexpr auto kPollInterval = std::chrono::microseconds(20);
constexpr auto kLookInterval = std::chrono::milliseconds(20);
constexpr auto kPoisonInterval = std::chrono::milliseconds(1);

// A call over several ranks takes some twenty events: they are kept for the next.
struct FreeEvents {
  std::mutex mutex;
  std::map<int, std::vector<cudaEvent_t>> of_device;
};
FreeEvents& free_events() {
  static auto& instance = *new FreeEvents;  // the driver may end before static objects do
  return instance;
}

}  // namespace

Event::Event() {
  check(cudaGetDevice(&device_), "cudaGetDevice");
  FreeEvents& free = free_events();
  const std::lock_guard lock(free.mutex);
  std::vector<cudaEvent_t>& some = free.of_device[device_];
  if (some.empty()) {
    check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
  } else {
    event_ = some.back();
    some.pop_back();
  }
}
Event::~Event() {
  FreeEvents& free = free_events();
  const std::lock_guard lock(free.mutex);
  free.of_device[device_].push_back(event_);
}
void Event::record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
void Event::follow(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, event_), "cudaStreamWaitEvent"); }

bool Event::passed() const {
  const cudaError_t status = cudaEventQuery(event_);
  if (status == cudaErrorNotReady) return false;
  check(status, "cudaEventQuery");
  return true;
}

NcclState::NcclState(int device, Seconds timeout) : device_(device), timeout_(timeout), thread_([this] { run(); }) {}

NcclState::~NcclState() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void NcclState::call(std::string_view what, const ncclComm_t& handle, const std::string& text,
                     const std::function<ncclResult_t()>& function) {
  const auto start = Clock::now();
  ncclResult_t result = ncclSuccess;
  {
    const std::lock_guard lock(mutex_);
    check_locked();
    ++calls_;
  }
  result = function();
  bool failed = false;
  {
    const std::lock_guard lock(mutex_);
    --calls_;
    failed = failure_.has_value();
  }
  if (failed) changed_.notify_all();
  while (result == ncclInProgress) {
    {
      const std::lock_guard lock(mutex_);
      check_locked();
      if (handle != nullptr) {
        const ncclResult_t asked = nccl().comm_get_async_error(handle, &result);
        if (asked != ncclSuccess) result = asked;
      }
    }
    if (result != ncclInProgress) break;
    if (Clock::now() - start > timeout_) {
      fail_late(text);
      check();
    }
    Clock::now() - start < kSpinTime ? std::this_thread::yield() : std::this_thread::sleep_for(kPollInterval);
  }
  if (result == ncclSuccess) return;
  const std::string error = nccl_error(what, result);
  if (result == ncclInvalidUsage || result == ncclInvalidArgument) throw ValueError(error);
  fail(false, error);
  check();
}

void NcclState::keep(ncclComm_t handle) {
  const std::lock_guard lock(mutex_);
  handles_.push_back(handle);
}

void NcclState::release(ncclComm_t handle, bool ours) noexcept {
  try {
    const OnDevice on_device(device_);
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return failure_ || running_.empty(); });
      if (std::erase(handles_, handle) == 0) return;  // aborted
    }
    if (!ours) return;
    ncclResult_t result = nccl().comm_finalize(handle);
    for (const auto start = Clock::now(); result == ncclInProgress && Clock::now() - start < timeout_;) {
      std::this_thread::sleep_for(kPollInterval);
      if (nccl().comm_get_async_error(handle, &result) != ncclSuccess) break;
    }
    result == ncclSuccess ? nccl().comm_destroy(handle) : nccl().comm_abort(handle);
  } catch (const std::exception&) {  // the driver is gone, and the handle with it
  }
}

void NcclState::watch(Watched watched) {
  bool first = false;
  {
    const std::lock_guard lock(mutex_);
    first = running_.empty();
    running_.push_back({.watched = std::move(watched), .since = {}});
  }
  if (first) changed_.notify_all();
}

// Flags that another rank has poisoned look like any: whoever was waiting hears of it here.
void NcclState::check() {
  std::unique_lock lock(mutex_);
  hear_peers(lock);
  check_locked();
}

void NcclState::check_locked() const {
  if (!failure_) return;
  if (late_) throw TimeoutError("parallel: " + *failure_ + ".");
  throw CommunicationError("parallel: " + *failure_ + ".");
}

void NcclState::fail(bool late, const std::string& text) noexcept {
  std::unique_lock lock(mutex_);
  fail_locked(lock, late, text);
}

void NcclState::fail_late(const std::string& text) noexcept { fail(true, late_text(text)); }

void NcclState::keep(std::shared_ptr<PeerPage> page) {
  const std::lock_guard lock(mutex_);
  pages_.push_back(std::move(page));
}

void NcclState::release(const std::shared_ptr<PeerPage>& page) noexcept {
  const std::lock_guard lock(mutex_);
  std::erase(pages_, page);
}

void NcclState::hear_peers(std::unique_lock<std::mutex>& lock) noexcept {
  if (failure_) return;
  for (const auto& page : pages_) {
    if (const auto failure = page->failure()) return fail_locked(lock, failure->late, failure->text);
  }
}

void NcclState::poison_pages() noexcept {
  for (const auto& page : pages_) page->poison();
}

// A function of NCCL that is under way would use what is aborted: new ones are not begun, and those get a second.
void NcclState::fail_locked(std::unique_lock<std::mutex>& lock, bool late, const std::string& text) noexcept {
  if (failure_) return;
  failure_ = text;
  late_ = late;
  for (const auto& page : pages_) page->fail({.late = late, .text = text});
  poison_pages();
  changed_.notify_all();
  changed_.wait_for(lock, std::chrono::seconds(1), [&] { return calls_ == 0; });
  abort_all(lock);
}

// The youngest first, and none beside another where that can be helped: NCCL's assertions may fail then (2.28.9, seen
// on two ranks). But each waits for the GPU, where another's operations may wait for ever, and for the end of graphs
// that have recorded it, which may not come: those that do not return soon are left to themselves.
void NcclState::abort_all(std::unique_lock<std::mutex>& lock) noexcept {
  const auto left = std::make_shared<std::atomic<std::size_t>>(0);
  const auto wait = [&](Clock::duration most) {
    for (const auto start = Clock::now(); *left > 0 && Clock::now() - start < most;) {
      poison_pages();
      changed_.wait_for(lock, kLookInterval);
    }
  };
  const std::vector<ncclComm_t> handles = std::exchange(handles_, {});  // nobody else's from here
  for (ncclComm_t handle : handles | std::views::reverse) {
    ++*left;
    const auto abort = [handle, left] {
      nccl().comm_abort(handle);
      --*left;
    };
    try {
      std::thread(abort).detach();
    } catch (const std::exception&) {  // no more threads
      abort();
    }
    wait(std::chrono::milliseconds(500));
  }
  wait(std::chrono::seconds(5));
}

std::string NcclState::late_text(const std::string& text) const {
  return fmt::format("{}, which did not come within {} s: it is lost or late", text, timeout_.count());
}

void NcclState::run() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // queries are no part of another thread's graph
  cudaThreadExchangeStreamCaptureMode(&mode);
  std::unique_lock lock(mutex_);
  while (!ending_) {
    const bool poisons = failure_ && !pages_.empty();
    if (poisons) {
      poison_pages();
      changed_.wait_for(lock, kPoisonInterval, [&] { return ending_; });
    } else if (running_.empty()) {
      changed_.wait(lock, [&] { return ending_ || !running_.empty() || (failure_ && !pages_.empty()); });
    } else {
      changed_.wait_for(lock, kLookInterval, [&] { return ending_; });
    }
    try {
      const OnDevice on_device(device_);
      look_locked(lock);
    } catch (const std::exception& error) {
      fail_locked(lock, false, error.what());
      running_.clear();
    }
    if (running_.empty()) changed_.notify_all();
  }
}

void NcclState::look_locked(std::unique_lock<std::mutex>& lock) {
  hear_peers(lock);
  if (failure_) return running_.clear();
  for (ncclComm_t handle : handles_) {
    ncclResult_t result = ncclSuccess;
    nccl().comm_get_async_error(handle, &result);
    if (result != ncclSuccess && result != ncclInProgress) {
      return fail_locked(lock, false, nccl_error("An operation of NCCL", result));
    }
  }
  running_.remove_if([](const Running& one) { return one.watched.ended->passed(); });
  for (Running& one : running_) {
    if (!one.since) {
      if (one.watched.began->passed()) one.since = Clock::now();
    } else if (Clock::now() - *one.since > timeout_) {
      return fail_locked(lock, true, late_text(one.watched.text));
    }
  }
}

}  // namespace ditattn::parallel
