// Where SAGE_ATTN_3's kernel for tcgen05 has its numbers and scales, by an emulation of the instructions that it
// multiplies with (tcgen05_emulated.hpp). The kernel (kernels/cuda/sage3_sm100_impl.hpp) takes all places from
// kernels/sage3_tcgen05_layout.hpp, as this test does.

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "kernels/sage3_fp4_layout.hpp"
#include "kernels/sage3_tcgen05_layout.hpp"
#include "tests/kernels/fp4_numbers.hpp"
#include "tests/kernels/options.hpp"
#include "tests/kernels/tcgen05_emulated.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

using tcgen05::Operand;

struct Shared {
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(227 * 1024);
  [[nodiscard]] std::uint8_t byte(unsigned at) const { return bytes.at(at); }
};

struct Tensor {
  std::vector<std::uint32_t> words = std::vector<std::uint32_t>(128 * 512, 0x7F7F7F7F);  // NaN
  std::uint32_t& word(int lane, int column) { return words.at(static_cast<std::size_t>(lane * 512 + column)); }
  [[nodiscard]] std::uint32_t word(int lane, int column) const {
    return words.at(static_cast<std::size_t>(lane * 512 + column));
  }
};

// One operand: its tile at `at`, its scales behind it.
template <class Tile>
struct Placed {
  unsigned at;
  Operand operand;
  [[nodiscard]] unsigned groups() const { return at + Tile::kTileBytes; }

  // Row `order(i)` as the i-th.
  template <class Order>
  Placed(Shared& shared, unsigned address, Operand which, const Fp4Numbers& numbers, const Order& order)
      : at(address), operand(which) {
    for (int row = 0; row < Tile::kRows; ++row) {
      for (int i = 0; i < numbers.count; ++i) {
        const unsigned byte = at + Tile::at(row, i / 32) + static_cast<unsigned>(fp4::byte_of(i % 32));
        shared.bytes.at(byte) |= static_cast<std::uint8_t>(numbers.code(order(row), i) << fp4::shift_of(i));
      }
      for (int group = 0; group < numbers.count / 16; ++group) {
        shared.bytes.at(groups() + static_cast<unsigned>(tcgen05::scale_at(row, group / 4) + group % 4)) =
            numbers.scale(order(row), group);
      }
    }
  }
  // As give_scales of the kernel.
  void give_scales(const Shared& shared, Tensor& tensor, std::uint32_t columns) const {
    for (int step = 0; step < Tile::kSteps; ++step) {
      const std::uint64_t from = tcgen05::describe(groups() + static_cast<unsigned>(step * tcgen05::kScaleBytes), 0);
      ASSERT_TRUE(emulated::SharedMatrix(from).is_valid);
      for (int row = 0; row < 32; ++row) {
        emulated::copy_scales(shared, tensor, columns + tcgen05::scale_column(operand, step), from, row);
      }
    }
  }
};

// As multiply_tiles of the kernel: a sum.
template <class A, class B>
double multiply_tiles(const Shared& shared, const Tensor& tensor, std::uint32_t columns, const Placed<A>& a,
                      const Placed<B>& b, int row, int column) {
  double sum = 0;
  for (int step = 0; step < A::kSteps; ++step) {
    sum += emulated::product<double>(shared, tensor, tcgen05::describe(a.at + A::step_at(step), A::kStride),
                                     tcgen05::describe(b.at + B::step_at(step), B::kStride),
                                     columns + tcgen05::scale_column(a.operand, step),
                                     columns + tcgen05::scale_column(b.operand, step), row, column);
  }
  return sum;
}

constexpr auto kAsTheyAre = [](int row) { return row; };
constexpr unsigned kFirst = 0x1230;  // some address
constexpr unsigned kSecond = 0x2A000;
constexpr std::uint32_t kColumns = 256;  // where columns of tensor memory were allocated

// Composed from the document's bit positions.
TEST(Sage3Tcgen05, DescriptorsAreTheDocuments) {
  EXPECT_EQ(tcgen05::describe(0x1230, 0x860), 0x0000'4008'0086'0123U);
  EXPECT_EQ(tcgen05::describe(0x38BF0, 0), 0x0000'4008'0000'38BFU);
  EXPECT_EQ(tcgen05::instruction(128), 0x0820'0480U);
  EXPECT_EQ(tcgen05::instruction(64), 0x0810'0480U);
  for (const int columns : {64, 128}) {
    const emulated::Instruction instruction(tcgen05::instruction(columns));
    EXPECT_TRUE(instruction.is_valid);
    EXPECT_EQ(instruction.columns, columns);
  }
}

// Sums of Q · K are where rows look for their logits.
template <int kHead>
void check_logits(std::mt19937_64& random) {
  using Query = tcgen05::OperandTile<tcgen05::kRows, kHead / 2>;
  using Key = tcgen05::OperandTile<fp4::kBlockKeys, kHead / 2>;
  const Fp4Numbers query(Query::kRows, kHead, random);
  const Fp4Numbers key(Key::kRows, kHead, random);
  Shared shared;
  Tensor tensor;
  const Placed<Query> a(shared, kFirst, Operand::query, query, kAsTheyAre);
  const Placed<Key> b(shared, kSecond, Operand::key, key, fp4::key_at);
  a.give_scales(shared, tensor, kColumns);
  b.give_scales(shared, tensor, kColumns);
  EXPECT_TRUE(emulated::SharedMatrix(tcgen05::describe(kSecond, Key::kStride)).is_valid);
  for (int row = 0; row < Query::kRows; ++row) {
    for (int i = 0; i < fp4::kBlockKeys; ++i) {  // find_logits of the kernel: a key, chunk by chunk
      const int column = i / 32 * 32 + fp4::column_of(i % 32);
      double expected = 0;
      for (int c = 0; c < kHead; ++c) expected += query.at(row, c) * key.at(i, c);
      ASSERT_DOUBLE_EQ(multiply_tiles(shared, tensor, kColumns, a, b, row, column), expected)
          << "row " << row << ", key " << i;
    }
  }
}
TEST(Sage3Tcgen05, LogitsAreThoseOfTheirKeys) {
  std::mt19937_64 random(options().seed);
  check_logits<64>(random);
  check_logits<128>(random);
}

// Sums of P · V, P as rows write it: pieces of 32 keys.
template <int kHead>
void check_outputs(std::mt19937_64& random) {
  using Probability = tcgen05::OperandTile<tcgen05::kRows, fp4::kBlockKeys / 2>;
  using Value = tcgen05::OperandTile<kHead, fp4::kBlockKeys / 2>;
  const Fp4Numbers probability(Probability::kRows, fp4::kBlockKeys, random);
  const Fp4Numbers value(kHead, fp4::kBlockKeys, random);  // by channel
  Shared shared;
  Tensor tensor;
  const Placed<Probability> a(shared, kFirst, Operand::probability, probability, kAsTheyAre);
  const Placed<Value> b(shared, kSecond, Operand::value, value, kAsTheyAre);
  a.give_scales(shared, tensor, kColumns);
  b.give_scales(shared, tensor, kColumns);
  for (int row = 0; row < Probability::kRows; ++row) {
    for (int channel = 0; channel < kHead; ++channel) {
      double expected = 0;
      for (int key = 0; key < fp4::kBlockKeys; ++key) expected += probability.at(row, key) * value.at(channel, key);
      ASSERT_DOUBLE_EQ(multiply_tiles(shared, tensor, kColumns, a, b, row, channel), expected)
          << "row " << row << ", channel " << channel;
    }
  }
}
TEST(Sage3Tcgen05, OutputsAreSumsOverTheirKeys) {
  std::mt19937_64 random(options().seed);
  check_outputs<64>(random);
  check_outputs<128>(random);
}

// Sums and scales of four operands are apart, among the columns that are allocated.
TEST(Sage3Tcgen05, ColumnsOfTensorMemoryAreApart) {
  std::set<int> taken;
  for (int column = 0; column < tcgen05::kSumColumns; ++column) taken.insert(column);
  for (const Operand operand : {Operand::query, Operand::key, Operand::probability, Operand::value}) {
    for (int step = 0; step < tcgen05::kMostSteps; ++step) {
      for (int i = 0; i < tcgen05::kScaleColumns; ++i) {
        const int column = tcgen05::scale_column(operand, step) + i;
        EXPECT_TRUE(taken.insert(column).second) << column;
        EXPECT_LT(column, tcgen05::kColumns);
      }
    }
  }
}

// Neither eight rows' pieces, nor as many pieces of successive rows, meet in a bank of 4 bytes.
template <class Tile>
void check_banks() {
  std::uint32_t rows = 0;
  std::uint32_t pieces = 0;
  for (int i = 0; i < 8; ++i) {
    rows |= 15U << Tile::at(i, Tile::kPieces - 1) / 4 % 32;
    pieces |= 15U << Tile::at(i / Tile::kPieces, i % Tile::kPieces) / 4 % 32;
  }
  EXPECT_EQ(rows, 0xFFFFFFFFU);
  EXPECT_EQ(pieces, 0xFFFFFFFFU);
}
TEST(Sage3Tcgen05, PiecesDoNotMeetInABank) {
  check_banks<tcgen05::OperandTile<128, 32>>();
  check_banks<tcgen05::OperandTile<128, 64>>();
  check_banks<tcgen05::OperandTile<64, 64>>();
}

}  // namespace
}  // namespace ditattn::kernels::cpu::testing
