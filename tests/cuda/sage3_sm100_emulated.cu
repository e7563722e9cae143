#include "tests/cuda/fp4_emulated_impl.hpp"
#include "tests/cuda/sage3_fp4_emulated.hpp"
#include "tests/cuda/sage3_fp4_emulated_impl.hpp"
#include "tests/cuda/tcgen05_emulated_impl.hpp"
//
#include "kernels/cuda/sage3_sm100_impl.hpp"

namespace ditattn::kernels::cuda {

void sage3_sm100_emulated(const AttentionProblem& problem, Sage3Smoothing smoothing) {
  run_emulated<Sage3Sm100Config>(problem, smoothing, []<class Config>(std::type_identity<Config>) {
    return sage3_sm100<Config, EmulatedTcgen05>;
  });
}

}  // namespace ditattn::kernels::cuda
