#include "nccl/outgoing.hpp"

#include <limits>

#include "kernels/cuda/launch_impl.hpp"
#include "nccl/row_copy.hpp"

namespace ditattn::parallel {
namespace {

using kernels::cuda::check;
using kernels::cuda::RowCopy;

// Bytes: such rows go as fast as what lies together (two H200s, NVLink); shorter ones were not measured.
constexpr std::int64_t kLeastRow = 256;

std::int64_t row_bytes(const RowCopy& rows) { return rows.shape.heads * rows.shape.head_size * rows.element_bytes; }

}  // namespace

RowCopy Outgoing::copy_to(void* memory) const {
  RowCopy copy = rows;
  copy.to = memory;
  return copy;
}

Outgoing outgoing(const SendBlock& send) {
  Outgoing one{.rank = send.rank, .bytes = send.bytes, .rows = {}};
  one.rows.from = send.data;
  return one;
}

std::vector<Outgoing> outgoing(std::span<const SendBlock> sends) {
  std::vector<Outgoing> all;
  for (const SendBlock& send : sends) {
    if (send.bytes > 0) all.push_back(outgoing(send));
  }
  return all;
}

std::vector<Outgoing> outgoing(std::span<const SendTokens> sends) {
  std::vector<Outgoing> all;
  for (const SendTokens& send : sends) {
    if (send.tokens.numel() == 0) continue;
    Outgoing one{.rank = send.rank,
                 .bytes = send.tokens.numel() * (send.tokens.dtype().bits / 8),
                 .is_together = send.packed == data_pointer(send.tokens),
                 .rows = row_copy(send.tokens, send.tokens)};
    const std::int64_t row = one.rows.shape.heads * one.rows.shape.head_size;
    one.rows.to = send.packed;
    one.rows.to_strides = {.batch = row, .token = one.rows.shape.batch * row, .head = one.rows.shape.head_size};
    all.push_back(one);
  }
  return all;
}

void pack_if(const std::function<bool(const Outgoing&)>& is_to_be, std::span<Outgoing> sends,
             const kernels::cuda::Launch& launch) {
  std::vector<RowCopy> rows;
  for (Outgoing& one : sends) {
    if (one.is_together || !is_to_be(one)) continue;
    rows.push_back(one.rows);
    one.rows.from = one.rows.to;
    one.rows.from_strides = one.rows.to_strides;
    one.is_together = true;
  }
  kernels::cuda::copy_rows(rows, launch);
}

bool suits_copy_engines(const Outgoing& one) {
  if (one.is_together) return true;
  constexpr std::int64_t widest = std::numeric_limits<std::int32_t>::max();
  const RowCopy& rows = one.rows;
  const std::int64_t width = row_bytes(rows);
  return (rows.shape.heads == 1 || rows.from_strides.head == rows.shape.head_size) && width >= kLeastRow &&
         rows.from_strides.token * rows.element_bytes >= width &&
         rows.from_strides.token * rows.element_bytes <= widest && width * rows.shape.batch <= widest;
}

void copy_by_engine(const Outgoing& one, char* to, cudaStream_t stream) {
  if (one.is_together) {
    return check(
        cudaMemcpyAsync(to, one.rows.from, static_cast<std::size_t>(one.bytes), cudaMemcpyDeviceToDevice, stream),
        "cudaMemcpyAsync");
  }
  const RowCopy& rows = one.rows;
  const auto width = static_cast<std::size_t>(row_bytes(rows));
  for (std::int64_t batch = 0; batch < rows.shape.batch; ++batch) {
    const char* from = static_cast<const char*>(rows.from) + batch * rows.from_strides.batch * rows.element_bytes;
    check(cudaMemcpy2DAsync(to + static_cast<std::size_t>(batch) * width,
                            static_cast<std::size_t>(rows.shape.batch) * width, from,
                            static_cast<std::size_t>(rows.from_strides.token * rows.element_bytes), width,
                            static_cast<std::size_t>(rows.shape.tokens), cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpy2DAsync");
  }
}

}  // namespace ditattn::parallel
