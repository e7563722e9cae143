// What the CPU's units can do: the rate of the kernels' own inner products on data in the first cache, in GFLOP/s over
// all threads, as JSON. Usage: ditattn_ceilings [THREADS]

#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <string_view>
#include <thread>
#include <vector>

#include "kernels/cpu/cpu_level.hpp"
#include "kernels/cpu/tile.hpp"

namespace {

using namespace ditattn::kernels::cpu;

double ticks_per_second() {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto ticks = __builtin_ia32_rdtsc();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  return static_cast<double>(__builtin_ia32_rdtsc() - ticks) /
         std::chrono::duration<double>(Clock::now() - start).count();
}

double gflops(const TileKernel& kernel, int threads) {
  std::vector<double> rates(static_cast<std::size_t>(threads));
  std::vector<std::thread> workers;
  workers.reserve(rates.size());
  for (double& rate : rates) {
    workers.emplace_back([&] {
      for (int i = 0; i < 200; ++i) rate = std::max(rate, kernel.multiply_rate());
    });
  }
  double sum = 0;
  for (std::size_t i = 0; i < workers.size(); ++i) {
    workers[i].join();
    sum += rates[i];
  }
  return 2e-9 * sum * ticks_per_second();
}

}  // namespace

int main(int argc, char** argv) {
  int threads = 1;
  const std::string_view given = argc > 1 ? argv[1] : "1";
  const auto [rest, error] = std::from_chars(given.begin(), given.end(), threads);
  if (error != std::errc() || rest != given.end() || threads < 1 || threads > 1024) {
    fmt::print(stderr, "ditattn_ceilings: '{}' is not a number of threads from 1 to 1024.\n", given);
    return 2;
  }
  const CpuLevel level = detect_cpu_level();
  std::string text = fmt::format("\"sse2 float32\": {:.1f}", gflops(kFlashSse2, threads));
  const auto add = [&](CpuLevel needed, const char* name, const TileKernel& kernel) {
    if (level >= needed) text += fmt::format(", \"{}\": {:.1f}", name, gflops(kernel, threads));
  };
  add(CpuLevel::avx2, "avx2 float32", kFlashAvx2);
  add(CpuLevel::avx512, "avx512 float32", kFlashAvx512);
  add(CpuLevel::avx512_bf16, "avx512_bf16 bfloat16", kFlashAvx512Bf16);
  add(CpuLevel::amx, "amx bfloat16", kFlashAmx);
  add(CpuLevel::avx2, "avx2 7-bit", kSageAvx2);
  add(CpuLevel::avx512_vnni, "avx512_vnni 8-bit", kSageAvx512Vnni);
  add(CpuLevel::amx, "amx 8-bit", kSageAmx);
  fmt::print("{{{}}}\n", text);
}
