#pragma once

#include <cstdint>
#include <vector>

#include "ditattn/tensor.hpp"

namespace ditattn {

/// Rows of bytes in host memory: row i starts at `first` + i · `step`.
struct HostRows {
  const char* first = nullptr;
  std::int64_t step = 0;

  [[nodiscard]] const char* row(std::int64_t index) const { return first + index * step; }
};

/// Reads rows of tensors wherever they are: the host's in place, a GPU's by copies of what is asked for alone. Copies
/// are ordered in this thread's stream, done after `wait`, and live as long as this object.
class HostReader {
 public:
  /// ValueError for devices other than CPU and CUDA; NotImplementedError while the stream is captured into a graph.
  explicit HostReader(DLDevice device);

  /// `count` rows of `width` bytes that start at `first` + i · `step`, any step. MemoryError where memory cannot be
  /// had.
  HostRows read(const void* first, std::int64_t step, std::int64_t width, std::int64_t count);
  /// Tokens [first, first + count) of one head of one batch entry of a tensor (B, S, heads, D).
  HostRows read_head(const Tensor& tensor, std::int64_t batch, std::int64_t head, std::int64_t first,
                     std::int64_t count);
  void wait() const;

 private:
  DLDevice device_;
  void* stream_ = nullptr;
  std::vector<Tensor> copies_;
};

/// `size` numbers of a dtype (float64, float32, float16, bfloat16) as float64.
void to_doubles(const char* from, DLDataType dtype, std::int64_t size, double* to);

}  // namespace ditattn
