#pragma once

/// How Hopper's kernel is cut for each head size.

#include <cstdint>

namespace ditattn::kernels::cuda {

/// FlashSm90Config's numbers: warpgroups of 64 rows each, keys of a block, blocks in flight.
struct FlashSm90Tile {
  int head_size;  ///< takes head sizes above the tile's before, up to this one
  int warpgroups;
  int keys;
  int stages;
  std::int64_t least_keys;  ///< for problems of as many keys; the last such tile of the head size is taken
  bool few_rows;            ///< the tile of the same blocks for problems that leave multiprocessors idle otherwise
};

/// A row's sums depend on how its keys are cut into blocks: so those follow from head size and number of keys, whatever
/// the batch and the device; rows of a tile may follow from these. Measured on an H100 against FlashAttention-3, the
/// reasons are in docs/kernels/flash_sm90.md. Beside each its shared memory, of which a multiprocessor has 227 KiB.
/// CMake reads the lines: a unit is compiled for each and dtype.
constexpr FlashSm90Tile kFlashSm90Tiles[] = {
    {64, 3, 128, 2, 0, false},     // 112 KiB
    {64, 1, 128, 2, 0, true},      // 80 KiB
    {72, 4, 64, 3, 0, false},      // 224 KiB
    {80, 3, 96, 2, 0, false},      // 192 KiB
    {96, 2, 176, 2, 0, false},     // 208 KiB
    {128, 2, 128, 2, 0, false},    // 192 KiB
    {128, 1, 128, 2, 0, true},     // 160 KiB
    {128, 3, 80, 3, 8192, false},  // 216 KiB
    {192, 2, 112, 2, 0, false},    // 216 KiB
    {256, 2, 80, 2, 0, false},     // 224 KiB
};

}  // namespace ditattn::kernels::cuda
