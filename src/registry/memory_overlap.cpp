#include "registry/memory_overlap.hpp"

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "core/tensor_extent.hpp"

namespace ditattn {
namespace {

std::int64_t item_size(const Tensor& tensor) { return tensor.dtype().bits / 8; }

// The rows of the last dimension as byte ranges, sorted. Broadcast dimensions repeat rows: visited once.
std::vector<MemoryRange> row_ranges(const Tensor& tensor) {
  const int last = tensor.ndim() - 1;
  std::vector<std::int64_t> offsets{0};
  for (int i = 0; i < last; ++i) {
    if (tensor.stride(i) == 0) continue;
    std::vector<std::int64_t> next;
    next.reserve(offsets.size() * static_cast<std::size_t>(tensor.size(i)));
    for (std::int64_t offset : offsets) {
      for (std::int64_t k = 0; k < tensor.size(i); ++k) next.push_back(offset + k * tensor.stride(i));
    }
    offsets = std::move(next);
  }
  const auto base = reinterpret_cast<std::intptr_t>(data_pointer(tensor));
  std::vector<MemoryRange> rows;
  rows.reserve(offsets.size());
  const std::int64_t length = ((tensor.size(last) - 1) * std::abs(tensor.stride(last)) + 1) * item_size(tensor);
  for (std::int64_t offset : offsets) {
    const std::int64_t first = offset + std::min<std::int64_t>(tensor.stride(last), 0) * (tensor.size(last) - 1);
    const std::intptr_t begin = base + first * item_size(tensor);
    rows.push_back({begin, begin + length});
  }
  std::ranges::sort(rows, {}, &MemoryRange::begin);
  return rows;
}

}  // namespace

bool overlaps_itself(const Tensor& tensor) {
  if (tensor.IsContiguous()) return false;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // stride, size
  for (int i = 0; i < tensor.ndim(); ++i) {
    if (tensor.size(i) == 0) return false;
    if (tensor.size(i) > 1) dims.emplace_back(std::abs(tensor.stride(i)), tensor.size(i));
  }
  std::ranges::sort(dims);
  std::int64_t reach = 0;  // of the dimensions so far, in elements
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

MemoryRange range_of(const Tensor& tensor) {
  const auto base = reinterpret_cast<std::intptr_t>(data_pointer(tensor));
  const std::int64_t item = item_size(tensor);
  MemoryRange range{base, base + item};
  const Extent extent(tensor);
  for (int i = 0; i < extent.rank; ++i) {
    if (extent.sizes[i] == 0) return {};
    const std::int64_t reach = extent.strides[i] * (extent.sizes[i] - 1) * item;
    (reach < 0 ? range.begin : range.end) += reach;
  }
  return range;
}

bool share_memory(const Tensor& a, const Tensor& b) {
  if (a.ndim() == 0 || b.ndim() == 0 || !range_of(a).meets(range_of(b))) return false;
  const std::vector<MemoryRange> rows_a = row_ranges(a);
  const std::vector<MemoryRange> rows_b = row_ranges(b);
  for (std::size_t i = 0, j = 0; i < rows_a.size() && j < rows_b.size();) {
    if (rows_a[i].end <= rows_b[j].begin) {
      ++i;
    } else if (rows_b[j].end <= rows_a[i].begin) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

}  // namespace ditattn
