#pragma once

#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu {

/// Spreads a problem over threads, tile by tile, on one unit's kernel. A thread that has several tiles of a K/V head
/// packs its K and V once for them, within 48 MB over all threads. Where there are few query rows and many keys, the
/// keys are split and the parts merged in order; the split depends on the numbers of rows and keys alone, so results
/// are bit-identical for any batch and thread count. Throws std::bad_alloc before anything is written.
void tiled_attention(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel);

}  // namespace ditattn::kernels::cpu
