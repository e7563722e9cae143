#pragma once

#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu {

/// Spreads a problem over threads, tile by tile, on one unit's kernel. Where several tiles share a K/V head, its K and
/// V are packed once, beside the tiles of the heads before: two or a few heads' worth of memory. Where there are few
/// query rows and many keys, the keys are split and the parts merged in order; the split depends on the numbers of rows
/// and keys alone, so results are bit-identical for any batch and thread count. Throws std::bad_alloc before anything
/// is written.
void tiled_attention(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel);

}  // namespace ditattn::kernels::cpu
