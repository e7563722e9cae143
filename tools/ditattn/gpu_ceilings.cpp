// What a GPU can do at most: by cuBLAS, which is opened where it is found, and by copies that the library can make.

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <random>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "tools/ditattn/ceilings.hpp"

namespace ditattn::cli {
namespace {

constexpr std::int64_t kSide = 8192;             // of the matrices
constexpr std::int64_t kCopyElements = 1 << 28;  // 1 GiB of float32
constexpr int kCalls = 10;                       // queued together, as long as clocks take to settle
constexpr int kRuns = 3;

// As cublas_v2.h and library_types.h have them.
constexpr int kNotTransposed = 0;
constexpr int kCuda32F = 0;
constexpr int kCuda16F = 2;
constexpr int kCuda16BF = 14;
constexpr int kCompute32F = 68;
constexpr int kDefaultAlgorithm = -1;

// cuBLAS, a handle of it, and what it says of it all.
class Blas {
 public:
  Blas() {
    void* library = ::dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) library = ::dlopen("libcublas.so.12", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw Error("RuntimeError", fmt::format("cuBLAS is not found ({})", ::dlerror()));
    open(library);
  }
  ~Blas() {
    if (handle_ != nullptr) destroy_(handle_);
  }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // c = a · b, all square.
  void multiply(const Tensor& a, const Tensor& b, Tensor& c) const {
    const float one = 1;
    const float zero = 0;
    const int type = a.dtype() == kFloat16 ? kCuda16F : a.dtype() == kBFloat16 ? kCuda16BF : kCuda32F;
    check(set_stream_(handle_, current_stream(a.device())), "cublasSetStream");
    check(multiply_(handle_, kNotTransposed, kNotTransposed, kSide, kSide, kSide, &one, a.data_ptr(), type, kSide,
                    b.data_ptr(), type, kSide, &zero, c.data_ptr(), type, kSide, kCompute32F, kDefaultAlgorithm),
          "cublasGemmEx");
  }

 private:
  static void check(int status, const char* what) {
    if (status != 0) throw Error("RuntimeError", fmt::format("{} gave status {}", what, status));
  }

  void open(void* library) {
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
      if (function == nullptr) throw Error("RuntimeError", fmt::format("cuBLAS has no {}", name));
    };
    int (*create)(void** handle) = nullptr;
    find(create, "cublasCreate_v2");
    find(destroy_, "cublasDestroy_v2");
    find(set_stream_, "cublasSetStream_v2");
    find(multiply_, "cublasGemmEx");
    check(create(&handle_), "cublasCreate");
  }

  void* handle_ = nullptr;
  int (*destroy_)(void* handle) = nullptr;
  int (*set_stream_)(void* handle, void* stream) = nullptr;
  int (*multiply_)(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a,
                   int type_a, int lda, const void* b, int type_b, int ldb, const void* beta, void* c, int type_c,
                   int ldc, int compute, int algorithm) = nullptr;
};

// The best of a few runs of several calls, in seconds per call; one call before them does not count.
double seconds_of(DLDevice device, const std::function<void()>& call) {
  call();
  synchronize(device);
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    synchronize(device);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / kCalls;
    best = run == 0 ? seconds : std::min(best, seconds);
  }
  return best;
}

// Random numbers: a GPU multiplies zeros at a higher clock. Drawn once and repeated, which it cannot know.
Tensor random_matrix(DLDataType dtype, DLDevice device) {
  constexpr std::int64_t drawn = 1 << 20;
  Tensor matrix = empty(std::array{kSide, kSide}, dtype);
  std::mt19937_64 generator(0);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < drawn; ++i) store_element(matrix.data_ptr(), i, dtype, normal(generator));
  auto* bytes = static_cast<char*>(matrix.data_ptr());
  const std::int64_t block = drawn * dtype.bits / 8;
  for (std::int64_t i = 1; i < kSide * kSide / drawn; ++i) std::copy_n(bytes, block, bytes + i * block);
  return copy_to(matrix, device);
}

Ceiling products_of(DLDataType dtype, DLDevice device) {
  const Blas blas;
  const Tensor a = random_matrix(dtype, device);
  const Tensor b = copy_to(a, device);
  Tensor c = copy_to(a, device);
  const double seconds = seconds_of(device, [&] { blas.multiply(a, b, c); });
  const auto side = static_cast<double>(kSide);
  return {.name = dtype_name(dtype),
          .rate = 2e-12 * side * side * side / seconds,
          .how = fmt::format("cuBLAS's product of {0} x {0} matrices, sums in float32", kSide)};
}

Ceiling memory_ceiling(DLDevice device) {
  const Tensor from = copy_to(empty(std::array{kCopyElements}, kFloat32), device);
  const double seconds = seconds_of(device, [&] { copy_to(from, device); });
  return {.name = "memory",
          .rate = 2e-9 * 4 * static_cast<double>(kCopyElements) / seconds,
          .how = "copies of 1 GiB within the GPU's memory, bytes read and written"};
}

}  // namespace

Ceilings measure_gpu_ceilings(DLDevice device, const std::vector<DLDataType>& dtypes) {
  Ceilings ceilings{.device = device};
  for (const DLDataType dtype : dtypes) {
    ceilings.products.push_back(measured(dtype_name(dtype), [&] { return products_of(dtype, device); }));
  }
  ceilings.memory = measured("memory", [&] { return memory_ceiling(device); });
  return ceilings;
}

}  // namespace ditattn::cli
