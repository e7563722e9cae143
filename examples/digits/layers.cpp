// Compiled with -ffast-math (see CMakeLists.txt): sums may then be vectorized, and std::exp becomes the vector one of
// the C library. Nothing here looks at NaN or Inf.

#include "layers.hpp"

#include <cblas.h>

#include <algorithm>
#include <cmath>

namespace digits {
namespace {

constexpr float kNormEpsilon = 1e-6F;
constexpr float kGeluSlope = 1.5957691216057308F;  // 2 · √(2/π)

// x · sigmoid(a); `a` is kept where exp does not overflow.
float gated(float x, float a) { return x / (1 + std::exp(std::min(-a, 80.0F))); }

}  // namespace

void use_serial_blas() { openblas_set_num_threads(1); }

void Linear::operator()(const float* x, std::int64_t rows, float* y) const {
  for (std::int64_t row = 0; row < rows; ++row) std::ranges::copy(bias, y + row * outputs);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<blasint>(rows), static_cast<blasint>(outputs),
              static_cast<blasint>(inputs), 1, x, static_cast<blasint>(inputs), weight.data(),
              static_cast<blasint>(inputs), 1, y, static_cast<blasint>(outputs));
}

void modulated_norm(const float* x, std::int64_t rows, std::int64_t width, const float* shift, const float* scale,
                    float* y) {
  for (std::int64_t row = 0; row < rows; ++row, x += width, y += width) {
    float sum = 0;
    for (std::int64_t i = 0; i < width; ++i) sum += x[i];
    const float mean = sum / static_cast<float>(width);
    float squares = 0;
    for (std::int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1 / std::sqrt(squares / static_cast<float>(width) + kNormEpsilon);
    for (std::int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * inverse * (1 + scale[i]) + shift[i];
  }
}

void add_gated(float* x, const float* y, std::int64_t rows, std::int64_t width, const float* gate) {
  for (std::int64_t row = 0; row < rows; ++row, x += width, y += width) {
    for (std::int64_t i = 0; i < width; ++i) x[i] += gate[i] * y[i];
  }
}

void silu(float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = gated(x[i], x[i]);
}

// (1 + tanh(a)) / 2 = sigmoid(2a).
void gelu(float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = gated(x[i], kGeluSlope * (x[i] + 0.044715F * x[i] * x[i] * x[i]));
}

}  // namespace digits
