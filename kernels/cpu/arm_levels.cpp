#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu {

CpuLevel detect_cpu_level() { return CpuLevel::neon; }

const LevelKernels& kernels_of(CpuLevel /*level*/) {
  static constexpr LevelKernels neon = {&kFlashNeon, nullptr, &kSageNeon, &kSageWideNeon, &kSage3Neon, nullptr};
  return neon;
}

}  // namespace ditattn::kernels::cpu
