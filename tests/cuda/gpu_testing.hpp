#pragma once

/// Tensors and errors of the tests that need a GPU.

#include <cuda_runtime.h>
#include <ditattn/ditattn.hpp>
#include <tvm/ffi/extra/c_env_api.h>

#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>

namespace ditattn::testing {

inline constexpr DLDevice kGpu{kDLCUDA, 0};

inline void must(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

/// A stream, and this thread's work in it, for a while.
class InStream {
 public:
  InStream() {
    cudaSetDevice(kGpu.device_id);
    if (cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) != cudaSuccess)
      throw std::runtime_error("no stream");
    TVMFFIEnvSetStream(kGpu.device_type, kGpu.device_id, stream_, &before_);
  }
  ~InStream() {
    cudaStreamSynchronize(stream_);
    TVMFFIEnvSetStream(kGpu.device_type, kGpu.device_id, before_, nullptr);
    cudaStreamDestroy(stream_);
  }
  InStream(const InStream&) = delete;
  InStream& operator=(const InStream&) = delete;
  [[nodiscard]] cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
  TVMFFIStreamHandle before_ = nullptr;
};

/// Standard normals, on the host.
inline Tensor random_tensor(std::initializer_list<std::int64_t> shape, DLDataType dtype, std::uint64_t seed) {
  Tensor tensor = empty(shape, dtype);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, dtype, normal(generator));
  return tensor;
}

/// Of two tensors of a dtype with the same strides, on the host: ‖got − expected‖ / ‖expected‖.
inline double relative_error(const Tensor& got, const Tensor& expected) {
  double difference = 0;
  double norm = 0;
  for (std::int64_t i = 0; i < expected.numel(); ++i) {
    const double e = load_element(expected.data_ptr(), i, expected.dtype());
    difference += std::pow(load_element(got.data_ptr(), i, got.dtype()) - e, 2);
    norm += e * e;
  }
  return std::sqrt(difference / norm);
}

inline bool same_bytes(const Tensor& a, const Tensor& b) {
  const Tensor x = copy_to(a, kCpu);
  const Tensor y = copy_to(b, kCpu);
  return std::memcmp(x.data_ptr(), y.data_ptr(), tvm::ffi::GetDataSize(*x.GetDLTensorPtr())) == 0;
}

}  // namespace ditattn::testing
