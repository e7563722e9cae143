#include "tools/ditattn/ceilings.hpp"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>

#include "ditattn/threads.hpp"
#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/ticks.hpp"
#include "kernels/cpu/tile.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/machine.hpp"

namespace ditattn::cli {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;
using kernels::cpu::CpuLevel;
using kernels::cpu::LevelKernels;
using kernels::cpu::TileKernel;

constexpr Seconds kProductsTime{0.04};  // of each kind of product
constexpr double kTicksTime = 0.02;     // seconds in which ticks are counted
constexpr std::size_t kLeastCopy = 256U << 20;
constexpr std::size_t kCopyPerThread = 16U << 20;
constexpr int kCopies = 5;

// CPUs that this process may run on: more threads than that take turns.
int cpus() {
  cpu_set_t set;
  return ::sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(CPU_COUNT(&set), 1) : 1;
}

double ticks_per_second() {
  const auto start = Clock::now();
  const auto ticks = kernels::cpu::read_ticks();
  while (Seconds(Clock::now() - start).count() < kTicksTime) {
  }
  return static_cast<double>(kernels::cpu::read_ticks() - ticks) / Seconds(Clock::now() - start).count();
}

// Each thread's best run while all others run the same.
struct ProductsAtOnce {
  const TileKernel& kernel;
  Clock::time_point end;
  std::mutex mutex = {};
  double sum = 0;

  void run() {
    double best = 0;
    do {
      best = std::max(best, kernel.multiply_rate());
    } while (Clock::now() < end);
    const std::lock_guard lock(mutex);
    sum += best;
  }
};

double products_tflops(const TileKernel& kernel, double ticks) {
  ProductsAtOnce work{.kernel = kernel,
                      .end = Clock::now() + std::chrono::duration_cast<Clock::duration>(kProductsTime)};
  parallel_for(
      num_threads(), [](void* context, std::int64_t) { static_cast<ProductsAtOnce*>(context)->run(); }, &work);
  return 2e-12 * work.sum / num_threads() * std::min(num_threads(), cpus()) * ticks;
}

// The kernels' own choice for bfloat16 is the faster one.
Ceiling products_of(DLDataType dtype, const LevelKernels& kernels, const std::string& level, double ticks) {
  Ceiling ceiling{.name = dtype_name(dtype), .rate = products_tflops(*kernels.flash_f32, ticks), .how = {}};
  const char* arithmetic = "float32";
  if (dtype == kBFloat16 && kernels.flash_bf16_dot != nullptr) {
    const double dot = products_tflops(*kernels.flash_bf16_dot, ticks);
    if (dot > *ceiling.rate) {
      ceiling.rate = dot;
      arithmetic = "bfloat16";
    }
  }
  ceiling.how = fmt::format("FLASH_ATTN's products in {}, level {}, data in the first cache, {} threads", arithmetic,
                            level, num_threads());
  return ceiling;
}

// More than the caches of all cores hold, but no large part of the memory.
std::size_t copied_bytes() {
  const std::size_t memory =
      static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t wanted = std::max(kLeastCopy, kCopyPerThread * static_cast<std::size_t>(num_threads()));
  return std::min(wanted, memory / 16);
}

// Two arrays, of which each thread has a slice that it touches first.
struct Copy {
  std::size_t slice = copied_bytes() / static_cast<std::size_t>(num_threads());
  std::unique_ptr<char[]> from{new char[slice * static_cast<std::size_t>(num_threads())]};
  std::unique_ptr<char[]> to{new char[slice * static_cast<std::size_t>(num_threads())]};

  // body(copy, offset) for all slices at once; the time that takes.
  double seconds_of(void (*body)(const Copy& copy, std::size_t offset)) const {
    struct Context {
      const Copy& copy;
      void (*body)(const Copy& copy, std::size_t offset);
    } context{*this, body};
    const auto start = Clock::now();
    parallel_for(
        num_threads(),
        [](void* given, std::int64_t i) {
          const auto& work = *static_cast<Context*>(given);
          work.body(work.copy, static_cast<std::size_t>(i) * work.copy.slice);
        },
        &context);
    return Seconds(Clock::now() - start).count();
  }
};

Ceiling memory_ceiling() {
  const Copy copy;
  copy.seconds_of([](const Copy& c, std::size_t offset) {
    std::memset(c.from.get() + offset, 1, c.slice);
    std::memset(c.to.get() + offset, 0, c.slice);
  });
  double best = 0;
  const std::size_t bytes = copy.slice * static_cast<std::size_t>(num_threads());
  for (int i = 0; i < kCopies; ++i) {
    const double seconds = copy.seconds_of(
        [](const Copy& c, std::size_t offset) { std::memcpy(c.to.get() + offset, c.from.get() + offset, c.slice); });
    best = std::max(best, 2e-9 * static_cast<double>(bytes) / seconds);
  }
  return {.name = "memory",
          .rate = best,
          .how = fmt::format("the best of {} copies of {} MiB, bytes read and written, {} threads", kCopies,
                             bytes >> 20, num_threads())};
}

Ceilings measure_cpu_ceilings(const std::vector<DLDataType>& dtypes) {
  Ceilings ceilings;
  const std::string level = cpu_level_in_effect();
  if (level.empty()) {  // kernels refuse it too
    for (const DLDataType dtype : dtypes) {
      ceilings.products.push_back({.name = dtype_name(dtype), .rate = {}, .how = "DITATTN_CPU_LEVEL is wrong"});
    }
  } else {
    const auto index = std::ranges::find(kernels::cpu::kCpuLevelNames, level) - kernels::cpu::kCpuLevelNames;
    const LevelKernels& kernels = kernels::cpu::kernels_of(static_cast<CpuLevel>(index));
    const double ticks = ticks_per_second();
    for (const DLDataType dtype : dtypes) ceilings.products.push_back(products_of(dtype, kernels, level, ticks));
    ceilings.products.push_back(
        {.name = "8 bits",
         .rate = products_tflops(*kernels.sage, ticks),
         .how =
             fmt::format("SAGE_ATTN's products, level {}, data in the first cache, {} threads", level, num_threads())});
  }
  ceilings.memory = measured("memory", memory_ceiling);
  return ceilings;
}

Json rate_json(const Ceiling& ceiling, const char* key, const char* unit) {
  return {{key, ceiling.name},
          {unit, ceiling.rate ? Json(*ceiling.rate) : Json(nullptr)},
          {"how", ceiling.rate ? Json(ceiling.how) : Json(nullptr)},
          {"reason", ceiling.rate ? Json(nullptr) : Json(ceiling.how)}};
}

}  // namespace

Ceiling measured(const std::string& name, const std::function<Ceiling()>& measure) {
  try {
    return measure();
  } catch (...) {
    return {.name = name, .rate = {}, .how = current_failure().message};
  }
}

Ceilings measure_ceilings(DLDevice device, const std::vector<DLDataType>& dtypes) {
  return device.device_type == kDLCPU ? measure_cpu_ceilings(dtypes) : measure_gpu_ceilings(device, dtypes);
}

Json to_json(const Ceilings& ceilings) {
  Json products = Json::array();
  for (const Ceiling& ceiling : ceilings.products) products.push_back(rate_json(ceiling, "type", "tflops"));
  Json memory = rate_json(ceilings.memory, "type", "gb_per_s");
  memory.erase("type");
  return {{"device", device_name(ceilings.device)}, {"products", std::move(products)}, {"memory", std::move(memory)}};
}

double operations(const Problem& p) {
  return (p.causal ? 2.0 : 4.0) * static_cast<double>(p.batch) * static_cast<double>(p.num_heads) *
         static_cast<double>(p.seq_q) * static_cast<double>(p.seq_kv) * static_cast<double>(p.head_size);
}

double bytes_moved(const Problem& p) {
  const double rows = 2.0 * static_cast<double>(p.seq_q * p.num_heads + p.seq_kv * p.num_kv_heads);
  return rows * static_cast<double>(p.batch) * static_cast<double>(p.head_size) * p.dtype.bits / 8;
}

std::optional<double> memory_ms(const Ceilings& ceilings, const Problem& problem) {
  if (!ceilings.memory.rate) return std::nullopt;
  return bytes_moved(problem) / (*ceilings.memory.rate * 1e9) * 1e3;
}

}  // namespace ditattn::cli
