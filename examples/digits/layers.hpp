#pragma once

/// The transformer's parts other than attention, on rows of floats. Serial: the model spreads images over threads.

#include <cstdint>
#include <vector>

namespace digits {

/// y = x · weightᵀ + bias.
struct Linear {
  std::int64_t inputs = 0;
  std::int64_t outputs = 0;
  std::vector<float> weight;  ///< (outputs, inputs), row-major
  std::vector<float> bias;    ///< (outputs)

  void operator()(const float* x, std::int64_t rows, float* y) const;
};

/// Makes OpenBLAS compute in the calling thread: the threads are ditattn's, and two pools would fight for the cores.
void use_serial_blas();

/// y = norm(x) · (1 + scale) + shift for each of `rows` rows of `width`; norm takes mean and variance out of a row.
void modulated_norm(const float* x, std::int64_t rows, std::int64_t width, const float* shift, const float* scale,
                    float* y);

/// x += gate · y for each row.
void add_gated(float* x, const float* y, std::int64_t rows, std::int64_t width, const float* gate);

/// In place: x · sigmoid(x).
void silu(float* x, std::int64_t count);

/// In place: the GELU with tanh.
void gelu(float* x, std::int64_t count);

}  // namespace digits
