#include "tests/kernels/engine.hpp"

#include <thread>

#include "kernels/cpu/sdpa_native.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

void on_threads(std::int64_t count, Executor::Body body, void* context) {
  std::vector<std::thread> others;
  for (std::int64_t i = 1; i < count; ++i) others.emplace_back(body, context, i);
  if (count > 0) body(context, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace

Executor executor(int threads) { return {.threads = threads, .parallel_for = &on_threads}; }

std::vector<Engine> engines() {
  std::vector<Engine> result;
  for (int level = 0; level <= static_cast<int>(detect_cpu_level()); ++level) {
    result.push_back({.name = std::string("flash_") + kCpuLevelNames[level],
                      .units = choose_units(static_cast<CpuLevel>(level), true)});
  }
  result.push_back({.name = "sdpa_native", .is_flash = false, .units = {}});
  return result;
}

void run(const Engine& engine, TestProblem& test, int threads) {
  test.clear_results();
  if (engine.is_flash) {
    flash_attention(test.problem(), executor(threads), engine.units);
  } else {
    sdpa_native(test.problem(), executor(threads));
  }
}

}  // namespace ditattn::kernels::cpu::testing
