#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/cuda/engine_rows.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/mask_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostThreads = 1024;
constexpr int kPieceKeys = 16;        // of a boolean mask, that are read at once
constexpr unsigned kManyLines = 512;  // that fill a GPU with `kThreads` each

__device__ std::int64_t length_of(const KeySegment& segment, std::int64_t batch) {
  if (segment.lengths == nullptr) return segment.keys;
  return clamp(segment.lengths[batch * segment.length_stride] - segment.length_offset, 0, segment.keys);
}

__device__ std::int64_t offset(const Strides& of, std::int64_t batch, std::int64_t row, std::int64_t head) {
  return batch * of.batch + row * of.token + head * of.head;
}

__global__ void lengths_kernel(const __grid_constant__ AttentionProblem p, std::int32_t* query_lengths,
                               std::int32_t* key_lengths) {
  const std::int64_t batch = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (batch >= p.batch) return;
  query_lengths[batch] = static_cast<std::int32_t>(p.rows);
  key_lengths[batch] = static_cast<std::int32_t>(length_of(p.key_segments[0], batch));
}

// Tokens of one tensor and where they go.
struct TokenCopy {
  const void* from;
  void* to;
  Strides from_strides, to_strides;
  std::int64_t tokens, heads;
};
struct TokenCopies {
  TokenCopy of[6];  // queries, keys and values of two segments
};

// One thread per 16 bytes, a row of blocks per copy.
__global__ void copy_kernel(const __grid_constant__ TokenCopies copies, std::int64_t batches, std::int64_t head_size) {
  constexpr std::int64_t kPiece = 8;  // elements
  const TokenCopy& copy = copies.of[blockIdx.y];
  const std::int64_t pieces = head_size / kPiece;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= batches * copy.tokens * copy.heads * pieces) return;
  const std::int64_t head = i / pieces % copy.heads;
  const std::int64_t token = i / pieces / copy.heads % copy.tokens;
  const std::int64_t batch = i / pieces / copy.heads / copy.tokens;
  const std::int64_t piece = i % pieces * kPiece;
  const auto* from = static_cast<const std::uint16_t*>(copy.from) + offset(copy.from_strides, batch, token, head);
  auto* to = static_cast<std::uint16_t*>(copy.to) + offset(copy.to_strides, batch, token, head);
  *reinterpret_cast<uint4*>(to + piece) = *reinterpret_cast<const uint4*>(from + piece);
}

// One thread per element of the joined mask, (batch, head, row, key) of `shape`.
template <typename T>
__global__ void mask_kernel(const __grid_constant__ AttentionProblem p, BiasShape shape, T* joined) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= shape.batch * shape.heads * shape.rows * p.keys) return;
  const std::int64_t key = i % p.keys;
  const std::int64_t row = i / p.keys % shape.rows;
  const std::int64_t head = i / p.keys / shape.rows % shape.heads;
  const std::int64_t batch = i / p.keys / shape.rows / shape.heads;
  const KeySegment& segment = p.key_segments[key >= p.key_segments[1].first_key ? 1 : 0];
  const std::int64_t of_segment = key - segment.first_key;
  const Mask& mask = segment.mask;
  const std::int64_t of_mask = row - mask.first_row;
  float x = of_segment < length_of(segment, batch) ? 0 : -INFINITY;
  if (x == 0 && mask.data != nullptr && of_mask >= 0 && of_mask < mask.rows) {
    x = load_mask(mask, offset(mask.strides, batch, of_mask, head) + of_segment * mask.key_stride);
  }
  if constexpr (sizeof(T) == 1) {
    joined[i] = x != -INFINITY ? 1 : 0;
  } else {
    narrow(x, joined[i]);
  }
}

// One thread per sequence, and one for the end.
__global__ void sequences_kernel(const __grid_constant__ AttentionProblem p, Sequences sequences,
                                 std::int32_t* query_lengths, std::int32_t* key_lengths, std::int64_t* offsets) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i > sequences.count) return;
  const bool end = i == sequences.count;
  const std::int64_t* numbers = sequences.numbers + 4 * (end ? i - 1 : i);
  const auto place = [&](const Strides& of, const std::int64_t* tokens, std::int64_t tokens_of_entry) {
    const std::int64_t first = tokens[0];
    return offset(of, first / tokens_of_entry, first % tokens_of_entry + (end ? tokens[1] : 0), 0);
  };
  const std::int64_t places = sequences.count + 1;
  offsets[i] = place(p.queries[0].strides, numbers, p.rows);
  offsets[places + i] = place(p.key_segments[0].key_strides, numbers + 2, p.keys);
  offsets[2 * places + i] = place(p.key_segments[0].value_strides, numbers + 2, p.keys);
  offsets[3 * places + i] = place(p.out_strides, numbers, p.rows);
  if (end) return;
  query_lengths[i] = static_cast<std::int32_t>(numbers[1]);
  key_lengths[i] = static_cast<std::int32_t>(numbers[3]);
}

// A row of the bias: of which batch entry, head and row.
struct BiasLine {
  std::int64_t batch;
  std::int64_t head;
  std::int64_t row;
  __device__ BiasLine(const BiasShape& shape, std::int64_t line)
      : batch(line / shape.rows / shape.heads), head(line / shape.rows % shape.heads), row(line % shape.rows) {}
  __device__ std::int64_t in(const Mask& mask) const {  // where its elements begin
    return offset(mask.strides, batch, row - mask.first_row, head);
  }
};

// One block per row of the bias.
template <typename T>
__global__ void bias_kernel(const __grid_constant__ AttentionProblem p, BiasShape shape, T* bias) {
  const Mask& mask = p.key_segments[0].mask;
  const std::int64_t first = BiasLine(shape, blockIdx.x).in(mask);
  T* to = bias + blockIdx.x * p.keys;
  for (std::int64_t key = threadIdx.x; key < p.keys; key += blockDim.x) {
    narrow(load_mask(mask, first + key * mask.key_stride), to[key]);
  }
}

// The same of a boolean mask that lies in pieces of 16 keys: one thread per piece. `hides` is −∞ of 16 bits.
__global__ void wide_bias_kernel(const __grid_constant__ AttentionProblem p, BiasShape shape, std::uint16_t hides,
                                 std::uint16_t* bias) {
  const Mask& mask = p.key_segments[0].mask;
  const auto* first = static_cast<const unsigned char*>(mask.data) + BiasLine(shape, blockIdx.x).in(mask);
  std::uint16_t* to = bias + blockIdx.x * p.keys;
  for (std::int64_t key = kPieceKeys * threadIdx.x; key < p.keys; key += kPieceKeys * blockDim.x) {
    const uint4 piece = *reinterpret_cast<const uint4*>(first + key);
    alignas(16) std::uint16_t x[kPieceKeys];
#pragma unroll
    for (int i = 0; i < kPieceKeys; ++i) x[i] = reinterpret_cast<const unsigned char*>(&piece)[i] != 0 ? 0 : hides;
    auto* pieces = reinterpret_cast<uint4*>(to + key);
    pieces[0] = reinterpret_cast<const uint4*>(x)[0];
    pieces[1] = reinterpret_cast<const uint4*>(x)[1];
  }
}

// One thread per row of the engine's.
__global__ void lse_kernel(const __grid_constant__ AttentionProblem p, EngineLse lse, std::int64_t lines,
                           std::int64_t rows) {
  const std::int64_t line = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (line >= lines) return;
  std::int64_t row = line % rows;
  const std::int64_t head = line / rows % p.heads;
  std::int64_t batch = line / rows / p.heads;
  const float* from = lse.data + offset(lse.strides, batch, row, head);
  if (lse.sequences.numbers != nullptr) {
    const std::int64_t* numbers = lse.sequences.numbers + 4 * batch;
    if (row >= numbers[1]) return;
    row += numbers[0];
    batch = row / p.rows;
    row %= p.rows;
  }
  p.lse[offset(p.lse_strides, batch, row, head)] = lse.factor * *from;
}

// One block per row and head of the output.
__global__ void out_kernel(const __grid_constant__ AttentionProblem p, const std::uint16_t* packed) {
  const std::int64_t line = blockIdx.x;
  const std::int64_t head = line % p.heads;
  const std::int64_t row = line / p.heads % p.rows;
  const std::int64_t batch = line / p.heads / p.rows;
  auto* out = static_cast<std::uint16_t*>(p.out) + offset(p.out_strides, batch, row, head);
  for (std::int64_t d = threadIdx.x; d < p.head_size; d += blockDim.x) out[d] = packed[line * p.head_size + d];
}

// The first key that a row of the mask does not hide, for all threads of a block; 0 where there is no mask, or no such
// row of it.
__device__ std::int64_t first_visible(const AttentionProblem& p, const BiasLine& line) {
  const Mask& mask = p.key_segments[0].mask;
  if (mask.data == nullptr || line.row < mask.first_row || line.row >= mask.first_row + mask.rows) return 0;
  __shared__ int first_key;
  if (threadIdx.x == 0) first_key = static_cast<int>(p.keys);
  __syncthreads();
  const std::int64_t first = line.in(mask);
  for (std::int64_t start = 0; start < p.keys; start += blockDim.x) {
    const std::int64_t key = start + threadIdx.x;
    const bool sees = key < p.keys && load_mask(mask, first + key * mask.key_stride) != -INFINITY;
    if (sees) atomicMin(&first_key, static_cast<int>(key));
    if (__syncthreads_or(sees ? 1 : 0) != 0) break;
  }
  return first_key;
}

// Rows of the output that share a row of the mask have `blocks` blocks, a thread each; a warp writes those without keys
// together.
__global__ void finish_kernel(const __grid_constant__ AttentionProblem p, BiasShape shape, unsigned blocks) {
  const BiasLine line(shape, blockIdx.x / blocks);
  const std::int64_t first_key = first_visible(p, line);
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  const std::int64_t rows = shape.rows > 1 ? 1 : p.rows;
  const std::int64_t heads = shape.heads > 1 ? 1 : p.heads;
  const std::int64_t row = line.row + index % rows;
  const std::int64_t head = line.head + index / rows % heads;
  const std::int64_t batch = line.batch + index / rows / heads;
  bool empty = false;
  if (index < rows * heads * (shape.batch > 1 ? 1 : p.batch)) {
    if (p.ranges != nullptr) {
      const std::int64_t* range = p.ranges + batch * p.range_batch_stride + 2 * row;
      empty = range[1] <= range[0];
    } else {
      std::int64_t end = length_of(p.key_segments[0], batch);
      if (p.causal) end = clamp(row + p.causal_offset + 1, 0, end);
      empty = end <= first_key;
    }
    if (empty && p.lse != nullptr) p.lse[offset(p.lse_strides, batch, row, head)] = -INFINITY;
  }
  const std::int64_t halves = p.out_type == ElementType::float32 ? 2 : 1;
  const long long place = offset(p.out_strides, batch, row, head) * halves;
  for (unsigned left = __ballot_sync(~0U, empty ? 1 : 0); left != 0; left &= left - 1) {
    auto* out = static_cast<std::uint16_t*>(p.out) + __shfl_sync(~0U, place, __ffs(static_cast<int>(left)) - 1);
    for (std::int64_t d = threadIdx.x % 32; d < p.head_size * halves; d += 32) out[d] = 0;
  }
}

unsigned grid(std::int64_t blocks) {
  if (blocks <= 2147483647) return static_cast<unsigned>(blocks);
  throw std::runtime_error(std::to_string(blocks) + " rows are too many for one launch. Split the batch.");
}

}  // namespace

void write_lengths(const AttentionProblem& problem, std::int32_t* query_lengths, std::int32_t* key_lengths,
                   const Launch& launch) {
  const OnDevice on_device(launch.device);
  lengths_kernel<<<grid((problem.batch + kThreads - 1) / kThreads), kThreads, 0,
                   static_cast<cudaStream_t>(launch.stream)>>>(problem, query_lengths, key_lengths);
  check(cudaGetLastError(), "write_lengths");
}

void write_joined(const AttentionProblem& segments, const AttentionProblem& joined, const Launch& launch) {
  const OnDevice on_device(launch.device);
  auto* const stream = static_cast<cudaStream_t>(launch.stream);
  TokenCopies copies{};
  int count = 0;
  std::int64_t most = 0;
  const auto add = [&](const void* from, const Strides& from_strides, const void* to, const Strides& to_strides,
                       std::int64_t first, std::int64_t tokens, std::int64_t heads) {
    auto* place = const_cast<char*>(static_cast<const char*>(to)) + 2 * first * to_strides.token;
    copies.of[count++] = {from, place, from_strides, to_strides, tokens, heads};
    most = std::max(most, tokens * heads);
  };
  const KeySegment& keys = joined.key_segments[0];
  for (int s = 0; s < 2; ++s) {
    const QuerySegment& query = segments.queries[s];
    const std::int64_t end = s == 0 ? segments.queries[1].first_row : segments.rows;
    add(query.data, query.strides, joined.queries[0].data, joined.queries[0].strides, query.first_row,
        end - query.first_row, segments.heads);
    const KeySegment& from = segments.key_segments[s];
    add(from.key, from.key_strides, keys.key, keys.key_strides, from.first_key, from.keys, segments.kv_heads);
    add(from.value, from.value_strides, keys.value, keys.value_strides, from.first_key, from.keys, segments.kv_heads);
  }
  const std::int64_t pieces = segments.batch * most * (segments.head_size / 8);
  const dim3 blocks(grid((pieces + kThreads - 1) / kThreads), static_cast<unsigned>(count));
  copy_kernel<<<blocks, kThreads, 0, stream>>>(copies, segments.batch, segments.head_size);
  check(cudaGetLastError(), "write_joined");
  if (keys.mask.data == nullptr) return;

  const BiasShape shape = bias_shape(joined);
  const unsigned elements = grid((shape.batch * shape.heads * shape.rows * joined.keys + kThreads - 1) / kThreads);
  const auto write = [&]<typename T>(T) {
    auto* mask = static_cast<T*>(const_cast<void*>(keys.mask.data));
    mask_kernel<<<elements, kThreads, 0, stream>>>(segments, shape, mask);
  };
  switch (keys.mask.type) {
    case ElementType::boolean:
      write(static_cast<unsigned char>(0));
      break;
    case ElementType::float16:
      write(__half{});
      break;
    case ElementType::bfloat16:
      write(__nv_bfloat16{});
      break;
    default:
      write(0.0F);
  }
  check(cudaGetLastError(), "write_joined");
}

void write_sequences(const AttentionProblem& problem, const Sequences& sequences, std::int32_t* query_lengths,
                     std::int32_t* key_lengths, std::int64_t* offsets, const Launch& launch) {
  const OnDevice on_device(launch.device);
  sequences_kernel<<<grid(sequences.count / kThreads + 1), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      problem, sequences, query_lengths, key_lengths, offsets);
  check(cudaGetLastError(), "write_sequences");
}

BiasShape bias_shape(const AttentionProblem& problem) {
  const Mask& mask = problem.key_segments[0].mask;
  return {.batch = mask.strides.batch == 0 ? 1 : problem.batch,
          .heads = mask.strides.head == 0 ? 1 : problem.heads,
          .rows = mask.strides.token == 0 ? 1 : problem.rows};
}

ElementType bias_type(const AttentionProblem& problem) {
  const ElementType mask = problem.key_segments[0].mask.type;
  return mask == ElementType::boolean || mask == problem.type ? problem.type : ElementType::float32;
}

void write_bias(const AttentionProblem& problem, void* bias, const Launch& launch) {
  const OnDevice on_device(launch.device);
  const BiasShape shape = bias_shape(problem);
  const Mask& mask = problem.key_segments[0].mask;
  const unsigned lines = grid(shape.batch * shape.heads * shape.rows);
  auto* const stream = static_cast<cudaStream_t>(launch.stream);
  const int threads = lines < kManyLines ? kMostThreads : kThreads;
  const ElementType type = bias_type(problem);
  const bool in_pieces = ((mask.strides.batch | mask.strides.token | mask.strides.head | problem.keys |
                           static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(mask.data))) %
                          kPieceKeys) == 0;
  if (mask.type == ElementType::boolean && mask.key_stride == 1 && in_pieces && type != ElementType::float32) {
    const std::uint16_t hides = type == ElementType::float16 ? 0xFC00 : 0xFF80;
    wide_bias_kernel<<<lines, threads, 0, stream>>>(problem, shape, hides, static_cast<std::uint16_t*>(bias));
    return check(cudaGetLastError(), "write_bias");
  }
  const auto write = [&]<typename T>(T* to) { bias_kernel<<<lines, threads, 0, stream>>>(problem, shape, to); };
  switch (type) {
    case ElementType::float16:
      write(static_cast<__half*>(bias));
      break;
    case ElementType::bfloat16:
      write(static_cast<__nv_bfloat16*>(bias));
      break;
    default:
      write(static_cast<float*>(bias));
  }
  check(cudaGetLastError(), "write_bias");
}

void write_lse(const AttentionProblem& problem, const EngineLse& lse, const Launch& launch) {
  const OnDevice on_device(launch.device);
  const bool packed = lse.sequences.numbers != nullptr;
  const std::int64_t rows = packed ? lse.sequences.longest_rows : problem.rows;
  const std::int64_t lines = (packed ? lse.sequences.count : problem.batch) * problem.heads * rows;
  lse_kernel<<<grid((lines + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      problem, lse, lines, rows);
  check(cudaGetLastError(), "write_lse");
}

void write_out(const AttentionProblem& problem, const void* out, const Launch& launch) {
  const OnDevice on_device(launch.device);
  out_kernel<<<grid(problem.batch * problem.heads * problem.rows), kThreads, 0,
               static_cast<cudaStream_t>(launch.stream)>>>(problem, static_cast<const std::uint16_t*>(out));
  check(cudaGetLastError(), "write_out");
}

void finish_rows(const AttentionProblem& problem, const Launch& launch) {
  const OnDevice on_device(launch.device);
  const bool masked = problem.key_segments[0].mask.data != nullptr;
  const BiasShape shape = masked ? bias_shape(problem) : BiasShape{};
  const std::int64_t lines = shape.batch * shape.heads * shape.rows;
  const std::int64_t of_line = (shape.rows > 1 ? 1 : problem.rows) * (shape.heads > 1 ? 1 : problem.heads) *
                               (shape.batch > 1 ? 1 : problem.batch);
  const std::int64_t blocks = (of_line + kThreads - 1) / kThreads;
  finish_kernel<<<grid(lines * blocks), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      problem, shape, static_cast<unsigned>(blocks));
  check(cudaGetLastError(), "finish_rows");
}

}  // namespace ditattn::kernels::cuda
