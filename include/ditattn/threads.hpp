#pragma once

#include <cstdint>

#include "ditattn/export.hpp"

namespace ditattn {

/// Threads that CPU kernels use, the caller's included: `set_num_threads`, else `DITATTN_NUM_THREADS`, else the
/// number of CPUs this process may run on.
DITATTN_API int num_threads();

/// Sets the number of threads for later calls; 0 goes back to the default. ValueError outside 0…1024.
DITATTN_API void set_num_threads(int count);

/// Body of `parallel_for`: does task `index`. It must not throw: it runs on threads that have nobody to catch it.
using ParallelBody = void (*)(void* context, std::int64_t index);

/// Calls `body(context, i)` once for each i in [0, count), on the calling thread and the process's one pool; returns
/// when all are done. Tasks are handed out one by one, in order (dynamic scheduling). Calls from several threads
/// share the pool, whose threads help only while fewer than `num_threads` are at work, callers included; nested calls
/// run on the calling thread. So cores are never oversubscribed by more than the callers themselves.
DITATTN_API void parallel_for(std::int64_t count, ParallelBody body, void* context);

}  // namespace ditattn
