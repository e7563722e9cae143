// SAGE_ATTN_3's kernels for products of NVFP4, and their launches.

#include "kernels/cuda/sage3_sm120.hpp"

#include <array>

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/fp4_impl.hpp"
//
#include "kernels/cuda/sage3_sm120_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

template <class T, int kHead>
Sage3Sm120Kernel kernel_of(ElementType type) {
  using Config = Sage3Sm120Config<T, kHead>;
  static_assert(Config::kSharedBytes <= 99 * 1024);
  return {.head_size = kHead,
          .rows = Config::kRows,
          .type = type,
          .shared_bytes = Config::kSharedBytes,
          .function = reinterpret_cast<const void*>(sage3_sm120<Config>)};
}

}  // namespace

std::span<const Sage3Sm120Kernel> built_sage3_sm120() {
  static const std::array built{kernel_of<__half, 64>(ElementType::float16),
                                kernel_of<__half, 128>(ElementType::float16),
                                kernel_of<__nv_bfloat16, 64>(ElementType::bfloat16),
                                kernel_of<__nv_bfloat16, 128>(ElementType::bfloat16)};
  return built;
}

void launch_sage3_sm120(const Sage3Sm120Kernel& kernel, const AttentionProblem& p, const Sage3Images& images,
                        bool adds_lse, FlashDevice& device, void* stream) {
  Sage3Sm120Arguments a{.problem = p,
                        .images = images,
                        .order = order_tiles(p, kernel.rows),
                        .aligned_output = has_aligned_output(p),
                        .adds_lse = adds_lse};
  const auto index = static_cast<int>(&kernel - built_sage3_sm120().data());
  prepare_flash(kernel.function, kernel.shared_bytes, index, device.prepared_sage3_sm120);
  void* pointers[] = {&a};
  check(cudaLaunchKernel(kernel.function, dim3(a.order.total_tiles), dim3(kSage3Sm120Threads), pointers,
                         static_cast<std::size_t>(kernel.shared_bytes), static_cast<cudaStream_t>(stream)),
        "sage3_sm120");
}

}  // namespace ditattn::kernels::cuda
