#include "tests/kernels/engine.hpp"

#include <thread>

#include "kernels/cpu/sdpa_native.hpp"
#include "kernels/cpu/tiled_attention.hpp"
#ifdef DITATTN_EMULATES_AMX
#include "tests/kernels/amx_emulated.hpp"
#endif

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
#ifdef DITATTN_EMULATES_AMX
  if (detect_cpu_level() >= CpuLevel::avx512_bf16) {
    result.push_back({.name = "flash_amx_emulated",
                      .units = choose_units(CpuLevel::avx512_bf16, true),
                      .bf16_kernel = &kFlashAmxEmulated});
  }
#endif
  result.push_back({.name = "sdpa_native", .is_flash = false, .units = {}});
  return result;
}

void run(const Engine& engine, TestProblem& test, int threads) {
  test.clear_results();
  const AttentionProblem& problem = test.problem();
  if (engine.bf16_kernel != nullptr && problem.type == ElementType::bfloat16 && problem.scale > 0) {
    tiled_attention(problem, executor(threads), *engine.bf16_kernel);
  } else if (engine.is_flash) {
    flash_attention(problem, executor(threads), engine.units);
  } else {
    sdpa_native(problem, executor(threads));
  }
}

}  // namespace ditattn::kernels::cpu::testing
