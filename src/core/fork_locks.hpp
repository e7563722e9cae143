#pragma once

/// What becomes of the process's own locks when it forks: a child has one thread, and those that held locks are gone.

#include <new>

namespace ditattn {

/// What is done with one lock, in the parent before a fork (none: null), in the parent after it, and in the child.
struct ForkActions {
  void* lock;
  void (*before)(void* lock);
  void (*in_parent)(void* lock);
  void (*in_child)(void* lock);
};

/// For a lock that lives as long as the process. Returns true, for a static variable that has this done once.
bool at_fork(const ForkActions& actions);

/// `mutex` is taken before a fork and free after it, so that a child finds whole what it guards. Only where nobody who
/// holds it waits for another lock or runs code of others: that may wait for the thread that forks. The child's is made
/// anew: glibc's know their owner by its thread's number, which is another there.
template <class Mutex>
bool hold_over_fork(Mutex& mutex) {
  return at_fork({&mutex, [](void* lock) { static_cast<Mutex*>(lock)->lock(); },
                  [](void* lock) { static_cast<Mutex*>(lock)->unlock(); }, [](void* lock) { new (lock) Mutex; }});
}

/// A child gets a new `mutex`, and that is all: for those under which code of others runs.
template <class Mutex>
bool renew_in_child(Mutex& mutex) {
  return at_fork({&mutex, nullptr, nullptr, [](void* lock) { new (lock) Mutex; }});
}

}  // namespace ditattn
