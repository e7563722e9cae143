#include "guard/output_scan.hpp"

#include <algorithm>
#include <cstring>

#include "core/host_rows.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

constexpr std::int64_t kPieceBytes = 8 << 20;

// Whether an element's exponent is all ones. A loop without branches, which compilers make vectors of.
template <class Bits>
bool has_non_finite(const char* memory, std::int64_t count, Bits exponent) {
  Bits found = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, memory + i * static_cast<std::int64_t>(sizeof(Bits)), sizeof(Bits));
    found |= static_cast<Bits>((bits & exponent) == exponent);
  }
  return found != 0;
}

bool has_non_finite(const char* memory, std::int64_t count, DLDataType dtype) {
  if (dtype == kBFloat16) return has_non_finite<std::uint16_t>(memory, count, 0x7F80);
  if (dtype == kFloat16) return has_non_finite<std::uint16_t>(memory, count, 0x7C00);
  if (dtype == kFloat32) return has_non_finite<std::uint32_t>(memory, count, 0x7F800000);
  if (dtype == kFloat64) return has_non_finite<std::uint64_t>(memory, count, 0x7FF0000000000000);
  throw ValueError("Cannot look for NaN in " + dtype_name(dtype));
}

}  // namespace

std::vector<Row> non_finite_rows(const Tensor& out, std::size_t most) {
  const DLDataType dtype = out.dtype();
  const std::int64_t item = dtype.bits / 8;
  const std::int64_t tokens = out.size(1);
  const std::int64_t size = out.size(3);
  // Heads that lie behind each other are read as one.
  const bool is_joined = out.size(2) == 1 || out.stride(2) == size;
  const std::int64_t heads = is_joined ? out.size(2) : 1;
  const std::int64_t width = heads * size;
  const std::int64_t tokens_at_once = std::max<std::int64_t>(kPieceBytes / (width * item), 1);
  std::vector<Row> found;
  const auto look_through = [&](std::int64_t batch, std::int64_t first_head, std::int64_t first, std::int64_t count) {
    HostReader reader(out.device());
    const std::int64_t at = batch * out.stride(0) + first * out.stride(1) + first_head * out.stride(2);
    const HostRows rows =
        reader.read(static_cast<const char*>(data_pointer(out)) + at * item, out.stride(1) * item, width * item, count);
    reader.wait();
    for (std::int64_t token = 0; token < count && found.size() < most; ++token) {
      if (!has_non_finite(rows.row(token), width, dtype)) continue;
      for (std::int64_t head = 0; head < heads && found.size() < most; ++head) {
        if (!has_non_finite(rows.row(token) + head * size * item, size, dtype)) continue;
        found.push_back({.batch = batch, .head = first_head + head, .query = first + token});
      }
    }
  };
  for (std::int64_t batch = 0; batch < out.size(0); ++batch) {
    for (std::int64_t head = 0; head < out.size(2); head += heads) {
      for (std::int64_t first = 0; first < tokens; first += tokens_at_once) {
        look_through(batch, head, first, std::min(tokens_at_once, tokens - first));
      }
    }
  }
  return found;
}

}  // namespace ditattn
