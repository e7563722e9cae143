// SAGE_ATTN_3's kernels for products of NVFP4 by tcgen05.

#include "kernels/cuda/fp4_impl.hpp"
#include "kernels/cuda/sage3_fp4_impl.hpp"
#include "kernels/cuda/tcgen05_impl.hpp"
//
#include "kernels/cuda/sage3_sm100_impl.hpp"

namespace ditattn::kernels::cuda {

std::span<const Sage3Fp4Kernel> built_sage3_sm100() {
  static const auto built = list_sage3_fp4<Sage3Sm100Config>("sage3_sm100", []<class Config>(std::type_identity<Config>) {
    static_assert(2 * Config::kSharedBytes <= 226 * 1024);  // two blocks of threads on a multiprocessor
    return reinterpret_cast<const void*>(sage3_sm100<Config, Tcgen05>);
  });
  return built;
}

}  // namespace ditattn::kernels::cuda
