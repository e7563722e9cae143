#pragma once

/// What is tested: flash_attention at one level, or sdpa_native.

#include <ostream>
#include <string>
#include <vector>

#include "kernels/cpu/flash_attention.hpp"
#include "kernels/cpu/tile.hpp"
#include "tests/kernels/test_problem.hpp"

namespace ditattn::kernels::cpu::testing {

struct Engine {
  std::string name;
  bool is_flash = true;
  CpuUnits units;
  const TileKernel* bf16_kernel = nullptr;  ///< instead of the units' for bfloat16
};

/// For GoogleTest.
inline std::ostream& operator<<(std::ostream& out, const Engine& engine) { return out << engine.name; }

/// All that this CPU can run: each level with all its units, whether faster or not, and sdpa_native.
std::vector<Engine> engines();

/// Threads of std::thread, one per task.
Executor executor(int threads);

/// Computes `out` and `lse`.
void run(const Engine& engine, TestProblem& test, int threads);

}  // namespace ditattn::kernels::cpu::testing
