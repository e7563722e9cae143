#include <algorithm>
#include <type_traits>

#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/mask_impl.hpp"
#include "kernels/cuda/token_rows.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// `N` neighbours that are read and written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Together {
  T of[N];
};

__device__ std::int64_t offset(const Strides& of, unsigned batch, unsigned token, unsigned head) {
  return batch * of.batch + token * of.token + head * of.head;
}

struct RowCopies {
  RowCopy of[kRowCopiesAtOnce];
};
static_assert(sizeof(RowCopies) <= 4096);  // a kernel's parameters

// A block per token, a row of blocks per copy. `Piece` is what a thread moves at once.
template <class Piece>
__global__ void copy_kernel(const __grid_constant__ RowCopies copies) {
  const RowCopy& copy = copies.of[blockIdx.y];
  const auto tokens = static_cast<unsigned>(copy.shape.tokens);
  if (blockIdx.x >= static_cast<unsigned>(copy.shape.batch) * tokens) return;
  const unsigned batch = blockIdx.x / tokens;
  const unsigned token = blockIdx.x % tokens;
  const auto pieces = static_cast<unsigned>(copy.shape.head_size * copy.element_bytes / sizeof(Piece));
  const auto heads = static_cast<unsigned>(copy.shape.heads);
  for (unsigned i = threadIdx.x; i < heads * pieces; i += kThreads) {
    const unsigned head = i / pieces;
    const auto place = [&](const Strides& strides) { return offset(strides, batch, token, head) * copy.element_bytes; };
    const auto* from = reinterpret_cast<const Piece*>(static_cast<const char*>(copy.from) + place(copy.from_strides));
    auto* to = reinterpret_cast<Piece*>(static_cast<char*>(copy.to) + place(copy.to_strides));
    to[i % pieces] = from[i % pieces];
  }
}

// A warp per row of a head. What is left out of `body` are the rows past the last.
template <class Body>
__device__ void for_my_row(const TokenShape& shape, const Body& body) {
  const auto tokens = static_cast<unsigned>(shape.tokens);
  const auto heads = static_cast<unsigned>(shape.heads);
  const unsigned row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= static_cast<unsigned>(shape.batch) * tokens * heads) return;
  body(row / heads / tokens, row / heads % tokens, row % heads);
}

// What each side's row counts for in the whole, and the whole's LSE.
struct Weights {
  float whole;
  float part;
  float lse;
};

__device__ Weights weights_of(float whole, float part) {
  if (part == -INFINITY) return {1, 0, whole};
  if (whole == -INFINITY) return {0, 1, part};
  const float largest = fmaxf(whole, part);
  if (isnan(whole) || isnan(part) || largest == INFINITY) return {NAN, NAN, NAN};
  const float of_whole = expf(whole - largest);
  const float of_part = expf(part - largest);
  const float sum = of_whole + of_part;
  return {of_whole / sum, of_part / sum, largest + logf(sum)};
}

template <class T, int N>
__device__ Together<T, N>* row_of(const PartRows& rows, unsigned batch, unsigned token, unsigned head) {
  return reinterpret_cast<Together<T, N>*>(static_cast<T*>(rows.out) + offset(rows.out_strides, batch, token, head));
}

template <class To, class A, class B, int N>
__global__ void merge_kernel(const __grid_constant__ TokenShape shape, const __grid_constant__ PartRows to,
                             const __grid_constant__ PartRows a, const __grid_constant__ PartRows b) {
  for_my_row(shape, [&](unsigned batch, unsigned token, unsigned head) {
    const unsigned lane = threadIdx.x % 32;
    const auto lse = [&](const PartRows& rows) { return rows.lse + offset(rows.lse_strides, batch, token, head); };
    const Weights weights = weights_of(*lse(a), *lse(b));
    __syncwarp();
    if (lane == 0) *lse(to) = weights.lse;
    auto* sum = row_of<To, N>(to, batch, token, head);
    const auto* one = row_of<A, N>(a, batch, token, head);
    const auto* other = row_of<B, N>(b, batch, token, head);
    for (unsigned i = lane; i < shape.head_size / N; i += 32) {  // of no weight: what stands there does not count
      Together<A, N> x{};
      Together<B, N> y{};
      if (weights.whole != 0) x = one[i];
      if (weights.part != 0) y = other[i];
      Together<To, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float scaled_x = weights.whole * widen(x.of[j]);
        const float scaled_y = weights.part * widen(y.of[j]);
        narrow(weights.whole == 0 ? scaled_y : weights.part == 0 ? scaled_x : scaled_x + scaled_y, result.of[j]);
      }
      sum[i] = result;
    }
  });
}

template <int N>
__global__ void clear_kernel(const __grid_constant__ TokenShape shape, const __grid_constant__ PartRows whole) {
  for_my_row(shape, [&](unsigned batch, unsigned token, unsigned head) {
    const unsigned lane = threadIdx.x % 32;
    if (lane == 0) whole.lse[offset(whole.lse_strides, batch, token, head)] = -INFINITY;
    auto* to = row_of<float, N>(whole, batch, token, head);
    for (unsigned i = lane; i < shape.head_size / N; i += 32) to[i] = {};
  });
}

template <class T, int N>
__global__ void round_kernel(const __grid_constant__ TokenShape shape, const __grid_constant__ PartRows to,
                             const __grid_constant__ PartRows from) {
  for_my_row(shape, [&](unsigned batch, unsigned token, unsigned head) {
    auto* rounded = row_of<T, N>(to, batch, token, head);
    const auto* exact = row_of<float, N>(from, batch, token, head);
    for (unsigned i = threadIdx.x % 32; i < shape.head_size / N; i += 32) {
      const Together<float, N> x = exact[i];
      Together<T, N> y;
#pragma unroll
      for (int j = 0; j < N; ++j) narrow(x.of[j], y.of[j]);
      rounded[i] = y;
    }
  });
}

bool lie_in(std::int64_t bytes, const void* data, const Strides& strides, std::int64_t element_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 && strides.batch * element_bytes % bytes == 0 &&
         strides.token * element_bytes % bytes == 0 && strides.head * element_bytes % bytes == 0;
}

bool lie_in_fours(const TokenShape& shape, const PartRows& rows) {
  const std::int64_t bytes = element_bytes(rows.type);
  return shape.head_size % 4 == 0 && lie_in(4 * bytes, rows.out, rows.out_strides, bytes);
}

std::int64_t blocks_of(const TokenShape& shape) {
  const std::int64_t rows = shape.batch * shape.tokens * shape.heads;
  if (rows > 2147483647) {
    throw std::runtime_error(std::to_string(rows) + " rows are too many for one launch. Split the batch.");
  }
  return (rows + kWarps - 1) / kWarps;
}

template <class Call>
void with_type(ElementType type, const Call& call) {
  type == ElementType::float32 ? call(float{}) : type == ElementType::float16 ? call(__half{}) : call(__nv_bfloat16{});
}

template <class Piece>
void queue_copies(const RowCopies& copies, std::size_t count, const Launch& launch) {
  std::int64_t most = 0;
  for (std::size_t i = 0; i < count; ++i) most = std::max(most, copies.of[i].shape.batch * copies.of[i].shape.tokens);
  if (most > 2147483647) {
    throw std::runtime_error(std::to_string(most) + " tokens are too many for one launch. Split the batch.");
  }
  if (most == 0) return;
  copy_kernel<Piece><<<dim3(static_cast<unsigned>(most), static_cast<unsigned>(count)), kThreads, 0,
                       static_cast<cudaStream_t>(launch.stream)>>>(copies);
  check(cudaGetLastError(), "copy_rows");
}

}  // namespace

void copy_rows(std::span<const RowCopy> copies, const Launch& launch) {
  const OnDevice on_device(launch.device);
  for (std::size_t first = 0; first < copies.size(); first += kRowCopiesAtOnce) {
    const auto some = copies.subspan(first, std::min(kRowCopiesAtOnce, copies.size() - first));
    const auto all_in = [&](std::int64_t bytes) {
      return std::ranges::all_of(some, [&](const RowCopy& copy) {
        return copy.shape.head_size * copy.element_bytes % bytes == 0 &&
               lie_in(bytes, copy.to, copy.to_strides, copy.element_bytes) &&
               lie_in(bytes, copy.from, copy.from_strides, copy.element_bytes);
      });
    };
    RowCopies together{};
    std::ranges::copy(some, together.of);
    all_in(16)  ? queue_copies<uint4>(together, some.size(), launch)
    : all_in(4) ? queue_copies<std::uint32_t>(together, some.size(), launch)
                : queue_copies<std::uint16_t>(together, some.size(), launch);
  }
}

void merge_rows(const TokenShape& shape, const PartRows& to, const PartRows& a, const PartRows& b,
                const Launch& launch) {
  const OnDevice on_device(launch.device);
  const std::int64_t blocks = blocks_of(shape);
  if (blocks == 0) return;
  const bool fours = lie_in_fours(shape, to) && lie_in_fours(shape, a) && lie_in_fours(shape, b);
  with_type(b.type, [&]<class B>(B) {
    const auto merge = [&]<class To, class A>(To, A) {
      queue(fours ? merge_kernel<To, A, B, 4> : merge_kernel<To, A, B, 1>, blocks, kThreads, 0, launch.stream,
            "merge_rows", shape, to, a, b);
    };
    const auto merge_into = [&]<class To>(To) {
      a.type == ElementType::float32 ? merge(To{}, float{}) : merge(To{}, B{});
    };
    to.type == ElementType::float32 ? merge_into(float{}) : merge_into(B{});
  });
}

void clear_rows(const TokenShape& shape, const PartRows& whole, const Launch& launch) {
  const OnDevice on_device(launch.device);
  const std::int64_t blocks = blocks_of(shape);
  if (blocks == 0) return;
  queue(lie_in_fours(shape, whole) ? clear_kernel<4> : clear_kernel<1>, blocks, kThreads, 0, launch.stream,
        "clear_rows", shape, whole);
}

void round_rows(const TokenShape& shape, const PartRows& to, const PartRows& from, const Launch& launch) {
  const OnDevice on_device(launch.device);
  const std::int64_t blocks = blocks_of(shape);
  if (blocks == 0) return;
  const bool fours = lie_in_fours(shape, to) && lie_in_fours(shape, from);
  with_type(to.type, [&]<class T>(T) {
    queue(fours ? round_kernel<T, 4> : round_kernel<T, 1>, blocks, kThreads, 0, launch.stream, "round_rows", shape, to,
          from);
  });
}

}  // namespace ditattn::kernels::cuda
