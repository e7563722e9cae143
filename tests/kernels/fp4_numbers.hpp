#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/nvfp4.hpp"

namespace ditattn::kernels::cpu::testing {

/// Rows of numbers with scales of 16, as random codes.
struct Fp4Numbers {
  int rows;
  int count;  ///< of a row
  std::vector<std::uint8_t> codes, scales;

  Fp4Numbers(int rows_, int count_, std::mt19937_64& random)
      : rows(rows_), count(count_), codes(static_cast<std::size_t>(rows * count)), scales(codes.size() / 16) {
    for (auto& code : codes) code = static_cast<std::uint8_t>(random() % 16);
    for (auto& scale : scales) scale = static_cast<std::uint8_t>(random() % 127);  // positive, not NaN
  }
  [[nodiscard]] std::uint8_t code(int row, int i) const { return codes[static_cast<std::size_t>(row * count + i)]; }
  [[nodiscard]] std::uint8_t scale(int row, int group) const {
    return scales[static_cast<std::size_t>(row * (count / 16) + group)];
  }
  [[nodiscard]] double at(int row, int i) const {
    return static_cast<double>(E2m1::decode(code(row, i))) * E4m3::decode(scale(row, i / 16));
  }
};

}  // namespace ditattn::kernels::cpu::testing
