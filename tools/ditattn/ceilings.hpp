#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/problem.hpp"
#include "tools/ditattn/output.hpp"

namespace ditattn::cli {

/// The highest rate of one kind of work that was measured here, or why it was not.
struct Ceiling {
  std::string name;            ///< "float32", "8 bits", "memory"
  std::optional<double> rate;  ///< products: TFLOP/s; memory: GB/s, read and written together; none: not measured
  std::string how;             ///< what was timed, or why it could not be
};

/// What a device can do at most, as far as that can be measured in half a second.
struct Ceilings {
  DLDevice device = kCpu;
  std::vector<Ceiling> products = {};  ///< by type of the numbers multiplied
  Ceiling memory = {};
};

/// On the CPU: the products of ditattn's own kernels on data in the first cache, on all threads, of each of `dtypes`
/// and of 8 bits, which SAGE_ATTN multiplies; and a copy of arrays beyond the caches. On a GPU: cuBLAS's products of
/// large matrices in each of `dtypes`, where that library is found, and a copy within the GPU's memory. Never throws
/// for what cannot be measured. Not thread-safe against other users of the thread pool, which would slow it down.
Ceilings measure_ceilings(DLDevice device, const std::vector<DLDataType>& dtypes);

/// What `measure` gives, or the reason why it throws: what cannot be measured is no reason to end.
Ceiling measured(const std::string& name, const std::function<Ceiling()>& measure);

/// The same on the first GPU; part of `measure_ceilings`.
Ceilings measure_gpu_ceilings(DLDevice device, const std::vector<DLDataType>& dtypes);

Json to_json(const Ceilings& ceilings);

/// Multiply-adds of both products, counted twice, of all keys and rows, masked or not; half of that when causal.
double operations(const Problem& problem);

/// What has to be read and written at least: query, key, value and output.
double bytes_moved(const Problem& problem);

/// The least time that memory allows, where its rate was measured.
std::optional<double> memory_ms(const Ceilings& ceilings, const Problem& problem);

}  // namespace ditattn::cli
