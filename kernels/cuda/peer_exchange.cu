#include "kernels/cuda/peer_exchange.hpp"

#include <vector>

#include "kernels/cuda/row_copies_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

enum class Word : std::uint8_t { ready, full };
constexpr unsigned kLine = 128 / sizeof(std::uint32_t);
// On a multiprocessor; half of its threads in all. Two of each, 8 KiB a block, have 2 MB under way to other GPUs, 5 µs
// of NVLink's time.
constexpr std::int64_t kSendBlocksEach = 2;
constexpr std::int64_t kCopyBlocksEach = 6;

__device__ std::uint32_t* word(std::uint32_t* words, Word kind, unsigned rank) {
  return words + (static_cast<unsigned>(kind) * kMostPeers + rank) * kLine;
}
__device__ std::uint32_t* arrivals(std::uint32_t* words) { return words + 2 * kMostPeers * kLine; }

__device__ bool has(std::uint64_t ranks, unsigned rank) { return (ranks >> rank & 1U) != 0; }

__device__ void tell(std::uint32_t* flag) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(1U) : "memory");
}

__device__ bool is_told(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}

// False: the ranks have given up.
__device__ bool await(const std::uint32_t* flag, const std::uint32_t* poison) {
  for (unsigned looks = 1; !is_told(flag); ++looks) {
    if (looks % 256 == 0 && *static_cast<const volatile std::uint32_t*>(poison) == kPeerPoison) return false;
  }
  return true;
}

// What a launch does of it.
struct Step {
  std::uint64_t to;      // ranks to wait for at the beginning, and to tell at the end
  std::uint64_t from;    // ranks to tell at the beginning
  unsigned sends;        // copies that go there, before those that stay
  unsigned send_blocks;  // that work on these
  unsigned blocks_there, blocks_here;  // of the longest copy
  bool is_first, is_last;
};

// Some copies, by some blocks.
template <class Piece>
__device__ void move_some(const RowCopy* copies, unsigned count, unsigned blocks, unsigned index, unsigned stride) {
  for (std::uint64_t i = index; i < std::uint64_t{blocks} * count; i += stride) {
    move_rows<Piece>(copies[i % count], static_cast<unsigned>(i / count));
  }
}

// A thread per rank. The first block tells; no other would do it once.
template <class Piece>
__global__ void __launch_bounds__(kRowThreads)
    exchange_kernel(const __grid_constant__ RowCopies copies, const __grid_constant__ PeerWords words,
                    const __grid_constant__ Step step) {
  static_assert(kRowThreads >= kMostPeers);
  static_assert(sizeof(copies) + sizeof(words) + sizeof(step) <= 4096);  // a kernel's parameters
  if (blockIdx.x >= step.send_blocks) {
    return move_some<Piece>(copies.of + step.sends, copies.count - step.sends, step.blocks_here,
                            blockIdx.x - step.send_blocks, gridDim.x - step.send_blocks);
  }
  const unsigned peer = threadIdx.x;
  const auto rank = static_cast<unsigned>(words.rank);
  const bool is_to = peer < kMostPeers && has(step.to, peer);
  if (step.is_first) {
    bool goes_on = true;
    if (blockIdx.x == 0 && peer < kMostPeers && has(step.from, peer)) tell(word(words.there[peer], Word::ready, rank));
    if (is_to) goes_on = await(word(words.here, Word::ready, peer), words.poison);
    if (__syncthreads_and(goes_on ? 1 : 0) == 0) return;
  }
  move_some<Piece>(copies.of, step.sends, step.blocks_there, blockIdx.x, step.send_blocks);
  if (!step.is_last) return;
  __threadfence_system();
  __shared__ bool is_last_block;
  __syncthreads();
  if (threadIdx.x == 0) is_last_block = atomicAdd(arrivals(words.here), 1U) == step.send_blocks - 1;
  __syncthreads();
  if (!is_last_block) return;
  __threadfence_system();
  if (threadIdx.x == 0) *arrivals(words.here) = 0;
  if (!is_to) return;
  *word(words.here, Word::ready, peer) = 0;
  tell(word(words.there[peer], Word::full, rank));
}

__global__ void await_kernel(const __grid_constant__ PeerWords words, std::uint64_t from) {
  const unsigned peer = threadIdx.x;
  if (!has(from, peer)) return;
  std::uint32_t* const flag = word(words.here, Word::full, peer);
  if (await(flag, words.poison)) *flag = 0;
}

}  // namespace

void exchange_rows(std::span<const RowCopy> there, std::span<const RowCopy> here, const PeerWords& words,
                   std::uint64_t to, std::uint64_t from, const Launch& launch) {
  const OnDevice on_device(launch.device);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, launch.device),
        "cudaDeviceGetAttribute");
  const auto blocks_for = [&](std::int64_t blocks, std::int64_t each) {
    return static_cast<unsigned>(std::min<std::int64_t>(blocks, each * multiprocessors));
  };
  std::vector<RowCopy> copies(there.begin(), there.end());
  copies.insert(copies.end(), here.begin(), here.end());
  std::size_t sent = 0;
  bool is_first = true;
  const auto launch_some = [&]<class Piece>(Piece, const RowCopies& some) {
    Step step{.to = to, .from = from, .is_first = is_first};
    step.sends = static_cast<unsigned>(std::min<std::size_t>(there.size() - sent, some.count));
    step.is_last = sent + step.sends == there.size() && (is_first || step.sends > 0);
    step.blocks_there = static_cast<unsigned>(blocks_of({some.of, step.sends}, sizeof(Piece)));
    step.blocks_here = static_cast<unsigned>(blocks_of({some.of + step.sends, some.count - step.sends}, sizeof(Piece)));
    step.send_blocks = blocks_for(std::int64_t{step.blocks_there} * step.sends, kSendBlocksEach);
    if (is_first) step.send_blocks = std::max(step.send_blocks, 1U);
    const unsigned copy_blocks = blocks_for(std::int64_t{step.blocks_here} * (some.count - step.sends), kCopyBlocksEach);
    queue(exchange_kernel<Piece>, step.send_blocks + copy_blocks, kRowThreads, 0, launch.stream, "exchange_rows", some,
          words, step);
    sent += step.sends;
    is_first = false;
  };
  copies.empty() ? launch_some(uint4{}, RowCopies{}) : for_each_launch(copies, launch_some);
}

void await_rows(const PeerWords& words, std::uint64_t from, const Launch& launch) {
  const OnDevice on_device(launch.device);
  queue(await_kernel, 1, kMostPeers, 0, launch.stream, "await_rows", words, from);
}

}  // namespace ditattn::kernels::cuda
