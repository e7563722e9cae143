#include "tests/faults/failing_allocations.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>

namespace ditattn::faults {
namespace {

constexpr std::int64_t kNever = INT64_MIN / 2;
std::atomic<std::int64_t> left{kNever};  // until one fails
std::atomic<bool> goes_on{false};
std::atomic<bool> failed{false};
std::atomic<std::size_t> smallest{0};
thread_local bool is_exempt = false;

// Allocates nothing itself.
bool must_fail(std::size_t size) {
  if (left.load(std::memory_order_relaxed) == kNever || is_exempt || size < smallest) return false;
  const std::int64_t before = left.fetch_sub(1);
  if (before > 1 || (before < 1 && !goes_on)) return false;
  failed = true;
  errno = ENOMEM;
  return true;
}

}  // namespace

FailingAllocation::FailingAllocation(std::int64_t nth, Failing failing, std::size_t at_least) {
  smallest = at_least;
  goes_on = failing == Failing::from_then_on;
  failed = false;
  left = nth;
}

FailingAllocation::~FailingAllocation() { end(); }

void FailingAllocation::end() { left = kNever; }

bool FailingAllocation::has_failed() { return failed; }

Exempt::Exempt() { is_exempt = true; }
Exempt::~Exempt() { is_exempt = false; }

}  // namespace ditattn::faults

using ditattn::faults::must_fail;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

namespace {
void* allocate(std::size_t size) {
  void* memory = must_fail(size) ? nullptr : std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*size*/) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t /*size*/) noexcept { std::free(memory); }

#else

// glibc's own, under the names by which a program may replace malloc.
extern "C" {
void* __libc_malloc(std::size_t size);                       // NOLINT(bugprone-reserved-identifier)
void* __libc_calloc(std::size_t count, std::size_t size);    // NOLINT(bugprone-reserved-identifier)
void* __libc_realloc(void* memory, std::size_t size);        // NOLINT(bugprone-reserved-identifier)
void* __libc_memalign(std::size_t align, std::size_t size);  // NOLINT(bugprone-reserved-identifier)

void* malloc(std::size_t size) { return must_fail(size) ? nullptr : __libc_malloc(size); }
void* calloc(std::size_t count, std::size_t size) {
  return must_fail(count * size) ? nullptr : __libc_calloc(count, size);
}
void* realloc(void* memory, std::size_t size) { return must_fail(size) ? nullptr : __libc_realloc(memory, size); }
void* aligned_alloc(std::size_t align, std::size_t size) {
  return must_fail(size) ? nullptr : __libc_memalign(align, size);
}
int posix_memalign(void** memory, std::size_t align, std::size_t size) {
  if (must_fail(size)) return ENOMEM;
  *memory = __libc_memalign(align, size);
  return *memory == nullptr ? ENOMEM : 0;
}
}

#endif
