#pragma once

#include <cstdint>

namespace ditattn::kernels::cuda {

/// Packed sequences of a problem, in device memory: only rows that see keys.
struct Sequences {
  /// Four for each: its first row, its rows, its first key, its keys; batch entry b's row r is b · rows + r. Ascending.
  const std::int64_t* numbers = nullptr;  ///< null: the problem has none
  std::int64_t count = 0;
  std::int64_t longest_rows = 0;
  std::int64_t longest_keys = 0;
  std::int64_t rows_before = 0;  ///< to be taken off first rows: what batch entries before have, for one entry alone
  std::int64_t keys_before = 0;  ///< the same for first keys
};

}  // namespace ditattn::kernels::cuda
