#include <algorithm>
#include <type_traits>

#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/mask_impl.hpp"
#include "kernels/cuda/row_copies_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kThreads = kRowThreads;
constexpr int kWarps = kThreads / 32;

// `N` neighbours that are read and written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Together {
  T of[N];
};

template <class Piece>
__global__ void copy_kernel(const __grid_constant__ RowCopies copies) {
  move_rows<Piece>(copies.of[blockIdx.y], blockIdx.x);
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

}  // namespace

void copy_rows(std::span<const RowCopy> copies, const Launch& launch) {
  const OnDevice on_device(launch.device);
  for_each_launch(copies, [&]<class Piece>(Piece, const RowCopies& some) {
    const std::int64_t blocks = blocks_of({some.of, some.count}, sizeof(Piece));
    if (blocks == 0) return;
    copy_kernel<Piece><<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(some.count)), kThreads, 0,
                         static_cast<cudaStream_t>(launch.stream)>>>(some);
    check(cudaGetLastError(), "copy_rows");
  });
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
