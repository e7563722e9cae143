// SAGE_ATTN_3's kernels for products of NVFP4 by mma.sync.

#include "kernels/cuda/fp4_impl.hpp"
#include "kernels/cuda/sage3_fp4_impl.hpp"
//
#include "kernels/cuda/sage3_sm120_impl.hpp"

namespace ditattn::kernels::cuda {

std::span<const Sage3Fp4Kernel> built_sage3_sm120() {
  static const auto built = list_sage3_fp4<Sage3Sm120Config>("sage3_sm120", []<class Config>(std::type_identity<Config>) {
    static_assert(Config::kSharedBytes <= 99 * 1024);
    return reinterpret_cast<const void*>(sage3_sm120<Config>);
  });
  return built;
}

}  // namespace ditattn::kernels::cuda
