#pragma once

/// PyTorch's own scaled_dot_product_attention, where LibTorch is in this process or can be opened: through its C
/// functions (torch/csrc/inductor/aoti_torch/c/shim.h), with nothing of PyTorch needed to build or to load this.

#include <string>

#include "kernels/attention_problem.hpp"

namespace ditattn::aten {

/// "2.11.0"; empty where there is no LibTorch to be had. Opened at the first call: `libtorch_cpu.so` of this process
/// (in Python, after `import torch`), or of the loader's search path.
const std::string& version();
/// Why there is none; empty if there is.
const std::string& problem();

struct Place {
  int cuda_device = -1;    ///< −1: the CPU
  void* stream = nullptr;  ///< a cudaStream_t
};

/// Whether PyTorch takes the problem as it lies, without a copy of an input: one segment of queries and of keys, no
/// ranges, no LSE, a scale above 0, no negative strides, no lengths, a mask that is boolean or of the inputs' type or
/// causality but not both; on a GPU starts and strides of multiples of 16 bytes.
bool takes(const kernels::AttentionProblem& problem, const Place& place);

/// Computes or, on a GPU, queues it: PyTorch's result, copied to `out`. What stands in rows without keys is PyTorch's:
/// on a GPU not always zeros. RuntimeError where PyTorch fails. Thread-safe.
void attention(const kernels::AttentionProblem& problem, const Place& place);

}  // namespace ditattn::aten
