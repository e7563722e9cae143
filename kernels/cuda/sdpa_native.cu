// Background: attention that must work everywhere. Approach: one block per 64 query rows of a head and 128 channels of
// the output, an online softmax over blocks of 64 keys, both products as register tiles of float32 FMAs fed from shared
// memory. Head sizes above 128 take one block per 128 channels, each with all logits. Rejected: matrix units, which
// have no float32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/mask_impl.hpp"
#include "kernels/cuda/sdpa_native.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kKeys = 64;
constexpr int kSlice = 128;  // channels of the output of one block of threads
constexpr int kStep = 32;    // of the head size, for the logits
constexpr int kThreads = 256;
constexpr int kMicro = 4;          // rows, and keys or channels, of a thread's tile
constexpr int kPitch = kRows + 4;  // aligned for float4, fewer bank conflicts
constexpr float kLog2E = 1.44269504F;
constexpr float kLn2 = 0.693147181F;

static_assert(kRows == kKeys && kThreads == (kRows / kMicro) * (kKeys / kMicro));

struct Shared {
  union {
    struct {
      float query[kStep][kPitch];
      float key[kStep][kPitch];
    } operands;
    float value[kKeys][kSlice];
  };
  float p[kKeys][kPitch];
  int begin[kRows];  // keys [begin, end) of the segment that each row sees, masks aside
  int end[kRows];
};

// What one block of threads works on.
struct Place {
  std::int64_t batch;
  std::int64_t head;
  std::int64_t kv_head;
  std::int64_t first_row;
  std::int64_t first_channel;
};

__device__ Place find_place(const AttentionProblem& p) {
  const std::int64_t tiles = (p.rows + kRows - 1) / kRows;
  const std::int64_t slices = (p.head_size + kSlice - 1) / kSlice;
  std::int64_t index = blockIdx.x;
  Place place{};
  place.first_row = index % tiles * kRows;
  index /= tiles;
  place.first_channel = index % slices * kSlice;
  index /= slices;
  place.head = index % p.heads;
  place.batch = index / p.heads;
  place.kv_head = place.head / (p.heads / p.kv_heads);
  return place;
}

template <class T>
__device__ const T* query_row(const AttentionProblem& p, const Place& place, std::int64_t row) {
  const bool second = p.num_queries == 2 && row >= p.queries[1].first_row;
  const QuerySegment& segment = p.queries[second ? 1 : 0];
  return static_cast<const T*>(segment.data) + place.batch * segment.strides.batch +
         (row - segment.first_row) * segment.strides.token + place.head * segment.strides.head;
}

// Sets what row `r` of the tile sees of a segment.
__device__ void find_limits(const AttentionProblem& p, const Place& place, const KeySegment& segment, int r,
                            Shared& shared) {
  const std::int64_t row = place.first_row + r;
  std::int64_t length = segment.keys;
  if (segment.lengths != nullptr) {
    length = clamp(segment.lengths[place.batch * segment.length_stride] - segment.length_offset, 0, segment.keys);
  }
  std::int64_t begin = 0;
  std::int64_t end = row < p.rows ? length : 0;
  if (row < p.rows && p.ranges != nullptr) {
    const std::int64_t* range = p.ranges + place.batch * p.range_batch_stride + 2 * row;
    begin = clamp(range[0] - segment.first_key, 0, length);
    end = clamp(range[1] - segment.first_key, 0, length);
  } else if (row < p.rows && p.causal) {
    end = clamp(row + p.causal_offset + 1 - segment.first_key, 0, length);
  }
  shared.begin[r] = static_cast<int>(begin);
  shared.end[r] = static_cast<int>(end);
}

__device__ void unpack(const float* from, float (&to)[kMicro]) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// `kStep` channels of kRows rows of Q, or of keys, to shared memory, one channel after the other; zero past the ends.
template <class T, class Row>
__device__ void load_operand(float (&to)[kStep][kPitch], std::int64_t rows, std::int64_t channel, std::int64_t channels,
                             const Row& row_of) {
  for (int i = threadIdx.x; i < kRows * kStep; i += kThreads) {
    const int row = i / kStep;
    const int c = i % kStep;
    to[c][row] = row < rows && channel + c < channels ? widen(row_of(row)[channel + c]) : 0;
  }
}

// sums[i][j] = Q row (ty · 4 + i) · key (tx · 4 + j) of the block at `first_key`.
template <class T>
__device__ void multiply_keys(const AttentionProblem& p, const Place& place, const KeySegment& segment,
                              std::int64_t first_key, Shared& shared, float (&sums)[kMicro][kMicro]) {
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  const T* keys = static_cast<const T*>(segment.key) + place.batch * segment.key_strides.batch +
                  place.kv_head * segment.key_strides.head + first_key * segment.key_strides.token;
  for (auto& row : sums) {
    for (float& sum : row) sum = 0;
  }
  for (std::int64_t channel = 0; channel < p.head_size; channel += kStep) {
    __syncthreads();
    load_operand<T>(shared.operands.query, p.rows - place.first_row, channel, p.head_size,
                    [&](int row) { return query_row<T>(p, place, place.first_row + row); });
    load_operand<T>(shared.operands.key, segment.keys - first_key, channel, p.head_size,
                    [&](int row) { return keys + row * segment.key_strides.token; });
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kStep; ++c) {
      float a[kMicro];
      float b[kMicro];
      unpack(&shared.operands.query[c][ty * kMicro], a);
      unpack(&shared.operands.key[c][tx * kMicro], b);
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
      }
    }
  }
}

// Sums to logits to the base 2; −∞ where hidden, and its bit set in the result.
__device__ unsigned hide(const AttentionProblem& p, const Place& place, const KeySegment& segment,
                         std::int64_t first_key, const Shared& shared, float (&logits)[kMicro][kMicro]) {
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  const Mask& mask = segment.mask;
  const float scale = p.scale * kLog2E;
  unsigned hidden = 0;
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int r = ty * kMicro + i;
    const std::int64_t mask_row = place.first_row + r - mask.first_row;
    const bool masked = mask.data != nullptr && mask_row >= 0 && mask_row < mask.rows;
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      const auto key = static_cast<int>(first_key) + tx * kMicro + j;
      bool seen = key >= shared.begin[r] && key < shared.end[r];
      float logit = logits[i][j] * scale;
      if (seen && masked) {
        const float bias = load_mask(mask, place.batch * mask.strides.batch + mask_row * mask.strides.token +
                                               place.head * mask.strides.head + key * mask.key_stride);
        seen = bias != -INFINITY;
        // A finite bias stays finite, as it hides nothing, also times log₂ e. NaN stays NaN.
        logit += bias * kLog2E;
        logit = seen && logit < -3.4e38F ? -3.4e38F : logit;
      }
      if (!seen) hidden |= 1U << (i * kMicro + j);
      logits[i][j] = seen ? logit : -INFINITY;
    }
  }
  return hidden;
}

// A value and all of the 16 threads that share rows.
template <class Join>
__device__ float join_row(float x, const Join& join) {
  for (int distance = 8; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(0xFFFFFFFFU, x, distance));
  return x;
}

// Logits to probabilities relative to the new maximum; leaves each row's rescale.
__device__ void softmax(float (&logits)[kMicro][kMicro], float (&max)[kMicro], float (&sum)[kMicro],
                        float (&rescale)[kMicro]) {
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    float largest = max[i];
    for (const float logit : logits[i]) largest = fmaxf(largest, logit);
    largest = join_row(largest, [](float a, float b) { return fmaxf(a, b); });
    const float subtract = largest == -INFINITY ? 0 : largest;
    float total = 0;
    for (float& logit : logits[i]) {
      logit = exp2f(logit - subtract);
      total += logit;
    }
    rescale[i] = exp2f(max[i] - subtract);
    sum[i] = fmaf(sum[i], rescale[i], join_row(total, [](float a, float b) { return a + b; }));
    max[i] = largest;
  }
}

// Output channels of a thread: tx · 4 + j, and 64 more for the second half.
constexpr int kHalves = kSlice / 64;

// out += P · V for the block at `first_key`. Where V has NaN or Inf, hidden keys are left out one by one: 0 · NaN is
// NaN.
template <class T>
__device__ void multiply_values(const AttentionProblem& p, const Place& place, const KeySegment& segment,
                                std::int64_t first_key, unsigned hidden, const float (&probabilities)[kMicro][kMicro],
                                Shared& shared, float (&out)[kMicro][kHalves][kMicro]) {
  constexpr float hidden_mark = -1;
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  const T* values = static_cast<const T*>(segment.value) + place.batch * segment.value_strides.batch +
                    place.kv_head * segment.value_strides.head + first_key * segment.value_strides.token +
                    place.first_channel;
  __syncthreads();  // all have read the operands, which V replaces
  bool special = false;
  for (int i = threadIdx.x; i < kKeys * kSlice; i += kThreads) {
    const int key = i / kSlice;
    const int c = i % kSlice;
    const bool exists = first_key + key < segment.keys && place.first_channel + c < p.head_size;
    const float x = exists ? widen(values[key * segment.value_strides.token + c]) : 0;
    special = special || !isfinite(x);
    shared.value[key][c] = x;
  }
  const bool some_special = __syncthreads_or(special ? 1 : 0) != 0;
#pragma unroll
  for (int j = 0; j < kMicro; ++j) {
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      const bool mark = some_special && (hidden >> (i * kMicro + j) & 1U) != 0;
      shared.p[tx * kMicro + j][ty * kMicro + i] = mark ? hidden_mark : probabilities[i][j];
    }
  }
  __syncthreads();
#pragma unroll 4
  for (int key = 0; key < kKeys; ++key) {
    float a[kMicro];
    unpack(&shared.p[key][ty * kMicro], a);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float b[kMicro];
      unpack(&shared.value[key][half * 64 + tx * kMicro], b);
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
        if (some_special && a[i] == hidden_mark) continue;
#pragma unroll
        for (int j = 0; j < kMicro; ++j) out[i][half][j] = fmaf(a[i], b[j], out[i][half][j]);
      }
    }
  }
}

template <class T>
__device__ void store(const AttentionProblem& p, const Place& place, const float (&max)[kMicro],
                      const float (&sum)[kMicro], const float (&out)[kMicro][kHalves][kMicro]) {
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  for (int i = 0; i < kMicro; ++i) {
    const std::int64_t row = place.first_row + ty * kMicro + i;
    if (row >= p.rows) continue;
    const float factor = sum[i] == 0 ? 0 : 1 / sum[i];
    T* target = static_cast<T*>(p.out) + place.batch * p.out_strides.batch + row * p.out_strides.token +
                place.head * p.out_strides.head;
    for (int half = 0; half < kHalves; ++half) {
      for (int j = 0; j < kMicro; ++j) {
        const std::int64_t channel = place.first_channel + half * 64 + tx * kMicro + j;
        if (channel < p.head_size) narrow(out[i][half][j] * factor, target[channel]);
      }
    }
    if (p.lse == nullptr || tx != 0 || place.first_channel != 0) continue;
    p.lse[place.batch * p.lse_strides.batch + row * p.lse_strides.token + place.head * p.lse_strides.head] =
        sum[i] == 0 ? -INFINITY : fmaf(max[i], kLn2, logf(sum[i]));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ AttentionProblem p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Place place = find_place(p);
  float out[kMicro][kHalves][kMicro] = {};
  float sum[kMicro] = {};
  float max[kMicro] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  for (int s = 0; s < p.num_key_segments; ++s) {
    const KeySegment& segment = p.key_segments[s];
    __syncthreads();
    if (threadIdx.x < kRows) find_limits(p, place, segment, static_cast<int>(threadIdx.x), shared);
    __syncthreads();
    int begin = static_cast<int>(segment.keys);
    int end = 0;
    for (int r = 0; r < kRows; ++r) {
      if (shared.begin[r] >= shared.end[r]) continue;
      begin = ::min(begin, shared.begin[r]);
      end = ::max(end, shared.end[r]);
    }
    for (int key = begin / kKeys * kKeys; key < end; key += kKeys) {
      float logits[kMicro][kMicro];
      multiply_keys<T>(p, place, segment, key, shared, logits);
      const unsigned hidden = hide(p, place, segment, key, shared, logits);
      float rescale[kMicro];
      softmax(logits, max, sum, rescale);
      for (int i = 0; i < kMicro; ++i) {
        for (auto& half : out[i]) {
          for (float& x : half) x *= rescale[i];
        }
      }
      multiply_values<T>(p, place, segment, key, hidden, logits, shared, out);
    }
  }
  store<T>(p, place, max, sum, out);
}

template <class T>
void launch_kernel(const AttentionProblem& problem, unsigned blocks, cudaStream_t stream) {
  check(cudaFuncSetAttribute(attend<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
        "cudaFuncSetAttribute");
  attend<T><<<blocks, kThreads, sizeof(Shared), stream>>>(problem);
  check(cudaGetLastError(), "sdpa_native");
}

}  // namespace

void sdpa_native(const AttentionProblem& problem, const Launch& launch) {
  const std::int64_t tiles = (problem.rows + kRows - 1) / kRows;
  const std::int64_t slices = (problem.head_size + kSlice - 1) / kSlice;
  constexpr std::int64_t most = 2147483647;
  const std::int64_t blocks = problem.batch * problem.heads * slices * tiles;
  if (blocks == 0) return;
  if (blocks > most || problem.keys > most - kKeys) {
    throw std::runtime_error("sdpa_native: " + std::to_string(blocks) + " blocks of rows and " +
                             std::to_string(problem.keys) + " keys; a launch takes at most " + std::to_string(most) +
                             " of each. Split the batch.");
  }
  const OnDevice on_device(launch.device);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto count = static_cast<unsigned>(blocks);
  if (problem.type == ElementType::float32) return launch_kernel<float>(problem, count, stream);
  if (problem.type == ElementType::float16) return launch_kernel<__half>(problem, count, stream);
  launch_kernel<__nv_bfloat16>(problem, count, stream);
}

}  // namespace ditattn::kernels::cuda
