#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/export.hpp"

namespace ditattn {

/// Standard normal tensors one after the other, rounded to `dtype`, in host memory; the same for the same seed. What is
/// larger than 4 million elements repeats itself with that period, which no head or sequence has: drawing more takes
/// longer than attention does.
class DITATTN_API NormalTensors {
 public:
  NormalTensors(std::uint64_t seed, DLDataType dtype) : generator_(seed), dtype_(dtype) {}
  Tensor next(const std::vector<std::int64_t>& shape);

 private:
  std::mt19937_64 generator_;
  std::normal_distribution<double> normal_;
  DLDataType dtype_;
};

/// MemoryError where query, key, value and output of a problem are more than this machine's memory.
DITATTN_API void check_host_memory(const Problem& problem);

/// Tensors that pose a problem, on its device.
struct RandomCall {
  Tensor query;
  Tensor key;
  Tensor value;
  AttentionMetadata metadata;
};

/// As `tune` describes them; joint text is an eighth of the tokens, 512 at most, in front.
RandomCall random_call(const Problem& problem, std::uint64_t seed);

}  // namespace ditattn
