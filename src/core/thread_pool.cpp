// One pool for the process. Background: kernels split their work into many tasks of unlike size (causal rows, padding),
// so tasks are handed out one at a time from a shared counter. Rejected: OpenMP (its runtimes fight when a process has
// two), oneTBB (a dependency for forty lines, and blind to ThreadSanitizer).

#include <fmt/format.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "core/environment.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "ditattn/threads.hpp"

namespace ditattn {
namespace {

constexpr int kMaxThreads = 1024;

int usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int default_threads() {
  const auto text = environment(Env::DITATTN_NUM_THREADS);
  if (!text) return usable_cpus();
  int count = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), count);
  if (error != std::errc() || end != text->data() + text->size() || count < 1 || count > kMaxThreads) {
    throw ValueError(fmt::format("DITATTN_NUM_THREADS='{}' is not a whole number from 1 to {}.", *text, kMaxThreads));
  }
  return count;
}

// One parallel_for under way. It lives on the caller's stack: workers leave it (`inside` = 0) before it ends.
struct Job {
  std::int64_t count;
  ParallelBody body;
  void* context;
  int most_at_work;    // threads in the whole pool while helpers join this job
  int helpers_wanted;  // guarded by Pool::mutex_
  int inside = 0;      // helpers at work, guarded by Pool::mutex_
  std::atomic<std::int64_t> next{0};

  void work() {
    for (std::int64_t i = next++; i < count; i = next++) body(context, i);
  }
};

class Pool {
 public:
  // Throws nothing: where there is no memory for helpers, the caller does it all.
  void run(Job& job) {
    if (!announce(job)) return job.work();
    wake_.notify_all();
    job.work();
    std::unique_lock lock(mutex_);
    std::erase(jobs_, &job);
    leave();
    done_.wait(lock, [&] { return job.inside == 0; });
  }

 private:
  void serve();

  bool announce(Job& job) {
    std::lock_guard lock(mutex_);
    try {
      add_workers(job.helpers_wanted);
      jobs_.push_back(&job);
    } catch (const std::bad_alloc&) {
      return false;
    }
    ++at_work_;
    return true;
  }

  // One thread less at work: another may help where one is wanted.
  void leave() {
    --at_work_;
    if (!jobs_.empty()) wake_.notify_one();
  }

  // Workers serve until the process ends. Where no more threads can be had, those there are do the work.
  void add_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error& error) {
      log(LogLevel::warning,
          fmt::format("Only {} of {} worker threads could be started: {}", workers_, wanted, error.what()));
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<Job*> jobs_;
  int workers_ = 0;
  int at_work_ = 0;  // callers and helpers; helpers join only while there are few enough
};

// True on pool threads and inside parallel_for: nested calls then run where they are.
thread_local bool inside_parallel_for = false;

void Pool::serve() {
  inside_parallel_for = true;
  std::unique_lock lock(mutex_);
  while (true) {
    const auto job =
        std::ranges::find_if(jobs_, [&](const Job* j) { return j->helpers_wanted > 0 && at_work_ < j->most_at_work; });
    if (job == jobs_.end()) {
      wake_.wait(lock);
      continue;
    }
    Job& mine = **job;
    --mine.helpers_wanted;
    ++mine.inside;
    ++at_work_;
    lock.unlock();
    mine.work();
    lock.lock();
    leave();
    if (--mine.inside == 0) done_.notify_all();
  }
}

// Never destroyed: its threads never end. After a fork the child has none of them and starts with a new pool.
Pool* pool_instance = nullptr;
std::once_flag pool_made;

Pool& pool() {
  std::call_once(pool_made, [] {
    pool_instance = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool_instance = new Pool; });
  });
  return *pool_instance;
}

std::atomic<int> chosen_threads{0};

}  // namespace

int num_threads() {
  const int chosen = chosen_threads.load(std::memory_order_relaxed);
  if (chosen > 0) return chosen;
  static const int fallback = default_threads();
  return fallback;
}

void set_num_threads(int count) {
  if (count < 0 || count > kMaxThreads) {
    throw ValueError(
        fmt::format("Number of threads {} is out of range: 1 to {}, or 0 for the default.", count, kMaxThreads));
  }
  chosen_threads = count;
}

void parallel_for(std::int64_t count, ParallelBody body, void* context) {
  const int threads =
      count > 1 && !inside_parallel_for ? static_cast<int>(std::min<std::int64_t>(num_threads(), count)) : 1;
  if (threads == 1) {
    for (std::int64_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  inside_parallel_for = true;
  Job job{
      .count = count, .body = body, .context = context, .most_at_work = num_threads(), .helpers_wanted = threads - 1};
  pool().run(job);
  inside_parallel_for = false;
}

}  // namespace ditattn
