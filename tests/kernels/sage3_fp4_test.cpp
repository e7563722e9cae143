// Where SAGE_ATTN_3's kernel for products of NVFP4 has its numbers and scales, by an emulation of the instructions that
// it multiplies with: what lanes give and get, as PTX ISA 8.7 has it. The kernel (kernels/cuda/sage3_sm120_impl.hpp)
// takes all places from kernels/sage3_fp4_layout.hpp, as this test does.

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/nvfp4.hpp"
#include "kernels/sage3_fp4_layout.hpp"
#include "tests/kernels/fp4_numbers.hpp"
#include "tests/kernels/options.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

constexpr int kWarp = 32;
using Bytes = std::vector<std::uint8_t>;
template <int kRegisters>
using Registers = std::array<std::array<std::uint32_t, kRegisters>, kWarp>;  // of each lane

std::uint32_t word_at(const Bytes& memory, int at) {
  std::uint32_t word = 0;
  for (int i = 3; i >= 0; --i) word = word << 8 | memory.at(static_cast<std::size_t>(at + i));
  return word;
}

// ldmatrix.m8n8.x4: lanes 8 · m to 8 · m + 7 give the rows of matrix m; register m of lane l is word l % 4 of row l
// / 4.
template <class Address>
Registers<4> load_matrices(const Bytes& memory, const Address& address_of) {
  Registers<4> result{};
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int m = 0; m < 4; ++m) result[lane][m] = word_at(memory, address_of(8 * m + lane / 4) + lane % 4 * 4);
  }
  return result;
}

double e2m1(std::uint32_t word, int i) { return E2m1::decode(word >> 4 * i & 15); }
double e4m3(std::uint32_t word, int i) { return E4m3::decode(word >> 8 * i & 255); }

// mma.sync.m16n8k64 of e2m1 with ue4m3 scales of 16 numbers (scale_vec::4X). A: register r of a lane has row lane / 4,
// plus 8 where r is odd, and columns 8 · (lane % 4) to + 7, plus 32 where r ≥ 2. B: register r has rows 8 · (lane % 4)
// to + 7, plus 32 where r is 1, of column lane / 4. C: sums of rows lane / 4 and + 8, columns 2 · (lane % 4) and + 1.
// Scales of A's row lane / 4 are the word of thread 2 · pair of its four, of the row 8 below that of the next; of B's
// column lane / 4, that of thread `thread`.
void multiply(std::array<std::array<double, 4>, kWarp>& sums, const Registers<4>& a, const Registers<4>& b,
              int first_of_b, const Registers<1>& row_scales, int pair, const Registers<1>& column_scales, int thread) {
  double rows[16][64];
  double columns[8][64];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + r % 2 * 8;
        const int k = 8 * (lane % 4) + i + r / 2 * 32;
        const int scale_lane = lane / 4 * 4 + 2 * pair + r % 2;
        rows[row][k] = e2m1(a[lane][r], i) * e4m3(row_scales[scale_lane][0], k / 16);
        if (r >= 2) continue;
        const int k_of_b = 8 * (lane % 4) + i + r * 32;
        columns[lane / 4][k_of_b] =
            e2m1(b[lane][first_of_b + r], i) * e4m3(column_scales[lane / 4 * 4 + thread][0], k_of_b / 16);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int c = 0; c < 4; ++c) {
      for (int k = 0; k < 64; ++k) sums[lane][c] += rows[lane / 4 + c / 2 * 8][k] * columns[2 * (lane % 4) + c % 2][k];
    }
  }
}

// Row `order(i)` as the i-th of a tile in shared memory.
template <class Order>
Bytes tile_of(const Fp4Numbers& numbers, const Order& order) {
  const int pitch = fp4::pitch(numbers.count / 2);
  Bytes memory(static_cast<std::size_t>(numbers.rows * pitch));
  for (int row = 0; row < numbers.rows; ++row) {
    for (int i = 0; i < numbers.count; ++i) {
      memory[static_cast<std::size_t>(row * pitch + fp4::byte_of(i))] |=
          static_cast<std::uint8_t>(numbers.code(order(row), i) << fp4::shift_of(i));
    }
  }
  return memory;
}
template <class Order>
Bytes scale_tile_of(const Fp4Numbers& numbers, const Order& order) {
  Bytes memory;
  for (int row = 0; row < numbers.rows; ++row) {
    for (int group = 0; group < numbers.count / 16; ++group) memory.push_back(numbers.scale(order(row), group));
  }
  return memory;
}

// What multiply_all of the kernel does: rows · all columns, over all steps. Sums of each eight columns.
using Sums = std::array<std::array<double, 4>, kWarp>;
std::vector<Sums> multiply_all(int num_columns, const std::vector<Registers<4>>& rows, const Registers<1>& row_scales,
                               const Bytes& columns, const Bytes& column_scales, int count) {
  const int pitch = fp4::pitch(count / 2);
  std::vector<Sums> sums(static_cast<std::size_t>(num_columns / 8));
  for (int step = 0; step < count / fp4::kStep; ++step) {
    for (int n = 0; n < num_columns; n += 32) {
      Registers<1> scales;
      for (int lane = 0; lane < kWarp; ++lane) {
        scales[lane][0] = word_at(column_scales, (n + fp4::scale_column_of(lane)) * (count / 16) + 4 * step);
      }
      for (int half = 0; half < 2; ++half) {
        const Registers<4> b =
            load_matrices(columns, [&](int lane) { return fp4::second_operand_at(lane, n + 16 * half, step, pitch); });
        for (int tile = 0; tile < 2; ++tile) {
          multiply(sums[static_cast<std::size_t>(n / 8 + 2 * half + tile)], rows[static_cast<std::size_t>(step)], b,
                   2 * tile, row_scales, step, scales, 2 * half + tile);
        }
      }
    }
  }
  return sums;
}

constexpr auto kAsTheyAre = [](int row) { return row; };

TEST(Sage3Fp4, KeysHaveOneColumnEach) {
  for (int key = 0; key < fp4::kBlockKeys; ++key) EXPECT_EQ(fp4::key_at(fp4::column_of(key)), key);
}

// Sums of Q · K are where threads look for their probabilities' logits.
TEST(Sage3Fp4, LogitsAreThoseOfTheirKeys) {
  std::mt19937_64 random(options().seed);
  for (const int channels : {64, 128}) {
    const Fp4Numbers query(16, channels, random);
    const Fp4Numbers key(fp4::kBlockKeys, channels, random);
    const Bytes query_tile = tile_of(query, kAsTheyAre);
    std::vector<Registers<4>> rows;
    for (int step = 0; step < channels / fp4::kStep; ++step) {
      rows.push_back(load_matrices(
          query_tile, [&](int lane) { return fp4::first_operand_at(lane, step, fp4::pitch(channels / 2)); }));
    }
    const Bytes query_scales = scale_tile_of(query, kAsTheyAre);
    Registers<1> scales{};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (fp4::scale_step_of(lane) >= channels / fp4::kStep) continue;
      scales[lane][0] = word_at(query_scales, fp4::scale_row_of(lane) * (channels / 16) + 4 * fp4::scale_step_of(lane));
    }
    const auto sums = multiply_all(fp4::kBlockKeys, rows, scales, tile_of(key, fp4::key_at),
                                   scale_tile_of(key, fp4::key_at), channels);
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 32; ++i) {  // of a row: step, half, number
        const int step = i / 16;
        const int half = i / 8 % 2;
        for (int row = 0; row < 2; ++row) {
          const int at = fp4::probability_sum(row, step, half, i % 8);
          const int its_key = fp4::probability_key(lane, step, half, i % 8);
          double expected = 0;
          for (int c = 0; c < channels; ++c) expected += query.at(lane / 4 + 8 * row, c) * key.at(its_key, c);
          ASSERT_DOUBLE_EQ(sums[static_cast<std::size_t>(at / 4)][lane][at % 4], expected)
              << "lane " << lane << ", key " << its_key;
        }
      }
    }
  }
}

// Codes and scales of P as threads pack them are those of their rows and keys.
TEST(Sage3Fp4, OutputsAreSumsOverTheirKeys) {
  std::mt19937_64 random(options().seed);
  for (const int channels : {64, 128}) {
    const Fp4Numbers probability(16, fp4::kBlockKeys, random);
    const Fp4Numbers value(channels, fp4::kBlockKeys, random);  // by channel
    std::vector<Registers<4>> rows(2);
    Registers<1> scales{};
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int step = 0; step < 2; ++step) {
        for (int r = 0; r < 4; ++r) {  // 2 · half + row
          for (int i = 0; i < fp4::kRegisterCodes; ++i) {
            const int row = lane / 4 + 8 * (r % 2);
            const int key = fp4::probability_key(lane, step, r / 2, i);
            const std::uint32_t code = probability.code(row, key);
            rows[static_cast<std::size_t>(step)][lane][r] |= code << 4 * i;
          }
        }
      }
      // The word of this lane's row and step: two of its bytes are of groups that this thread has numbers of.
      const int row = fp4::scale_row_of(lane);
      const int step = fp4::scale_step_of(lane);
      for (const int from : {lane, lane ^ 2}) {
        for (int half = 0; half < 2; ++half) {
          const int group = fp4::probability_key(from, step, half, 0) / fp4::kGroup;
          const std::uint32_t scale = probability.scale(row, group);
          scales[lane][0] |= scale << 8 * fp4::probability_scale_byte(from, half);
        }
      }
    }
    const Bytes tile = tile_of(value, kAsTheyAre);
    const Bytes value_scales = scale_tile_of(value, kAsTheyAre);
    const auto sums = multiply_all(channels, rows, scales, tile, value_scales, fp4::kBlockKeys);
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int j = 0; j < channels / 8; ++j) {
        for (int c = 0; c < 4; ++c) {
          double expected = 0;
          for (int key = 0; key < fp4::kBlockKeys; ++key) {
            expected += probability.at(lane / 4 + c / 2 * 8, key) * value.at(8 * j + 2 * (lane % 4) + c % 2, key);
          }
          ASSERT_DOUBLE_EQ(sums[static_cast<std::size_t>(j)][lane][c], expected)
              << "lane " << lane << ", channel " << 8 * j;
        }
      }
    }
  }
}

// Rows of eight threads begin in different banks of 4 bytes.
TEST(Sage3Fp4, RowsDoNotMeetInABank) {
  for (const int row_bytes : {32, 64}) {
    std::uint32_t banks = 0;
    for (int row = 0; row < 8; ++row) banks |= 15U << fp4::pitch(row_bytes) * row / 4 % 32;
    EXPECT_EQ(banks, 0xFFFFFFFFU);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu::testing
