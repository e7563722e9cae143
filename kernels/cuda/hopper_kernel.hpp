#pragma once

/// Kernels for Hopper as their units (hopper_units.cmake), one per tile and dtype, give them to launchers, and what
/// those have in common.

#include <cuda.h>

#include <span>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/flash_device.hpp"

namespace ditattn::kernels::cuda {

/// How a kernel is cut for a head size.
struct HopperTile {
  int head_size;    ///< takes head sizes above the tile's before, up to this one
  int warpgroups;   ///< of 64 rows each
  int keys;         ///< of a block
  int stages;       ///< blocks in flight
  int row_percent;  ///< time of a row where all multiprocessors have as many tiles, of that in the tile of the same
                    ///< blocks that is first
};

struct HopperKernel {
  HopperTile tile;
  ElementType type;
  int place;  ///< among the kernels of its list: `prepared` has two bits for each
  int threads;
  int shared_bytes;
  const void* functions[2];  ///< __global__, of one argument: flash_sm90 without and with masks; sage_sm90 for Q and K
                             ///< of whole numbers and of e4m3
};

/// The kernel of a list for a problem, as a table of tiles has it: of tiles of the same blocks the one that is done
/// first. Null where there is none.
const HopperKernel* find_hopper_kernel(std::span<const HopperKernel> built, std::span<const HopperTile> tiles,
                                       const AttentionProblem& problem, int multiprocessors);

/// Whether there can be maps of a tensor.
bool can_map(const void* data, std::int64_t batch, std::int64_t tokens, std::int64_t heads, const Strides& strides);

/// The map of a (batch, tokens, heads, head_size) tensor of the problem's dtype that has tokens: in boxes of 64
/// channels of `box_tokens`, swizzled, zeros past the ends. A thread's last ones are kept. Throws std::runtime_error
/// with the driver's reason.
void find_map(CUtensorMap& map, const AttentionProblem& problem, const void* data, std::int64_t batch,
              std::int64_t tokens, std::int64_t heads, const Strides& strides, int box_tokens);

/// The maps of each segment of Q, in boxes of `rows`, and of K and V, in boxes of `keys`.
void find_input_maps(CUtensorMap (&query)[2], CUtensorMap (&key)[2], CUtensorMap (&value)[2],
                     const AttentionProblem& problem, int rows, int keys);

/// Whether there can be maps of the output.
bool maps_output(const AttentionProblem& problem);

/// The output's maps, one for each segment of queries, in boxes of a warp's 16 rows.
void find_output_maps(CUtensorMap (&maps)[2], const AttentionProblem& problem);

/// How a kernel is launched that may start under the end of the one before in its stream: it waits itself.
struct OverlappingLaunch {
  std::int64_t blocks;  ///< a multiple of `ranks`
  int threads;          ///< of a block
  int shared_bytes;
  void* stream;        ///< a cudaStream_t
  unsigned ranks = 1;  ///< neighbouring blocks in a cluster
};

/// Launches a __global__ function; `arguments` has a pointer to each of its arguments, `name` is for errors. Throws
/// std::runtime_error with the driver's reason.
void launch_overlapping(const void* function, const OverlappingLaunch& launch, void** arguments, const char* name);

/// One such launch of the kernel's function in that place; `arguments` points to its argument.
void launch_hopper(const HopperKernel& kernel, int function, void* arguments, unsigned tiles, int multiprocessors,
                   std::atomic<std::uint64_t>& prepared, void* stream, const char* name);

}  // namespace ditattn::kernels::cuda
