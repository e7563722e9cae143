#include "tuner/random_call.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

constexpr std::int64_t kPeriod = (std::int64_t{1} << 22) - 3;  // a prime: no size of a tensor divides it

// (1, keys): the last quarter of the keys is padding, one at least: a mask that hides nothing is none.
Tensor padding_mask(std::int64_t keys) {
  Tensor mask = empty({1, keys}, kBool);
  std::memset(mask.data_ptr(), 0, static_cast<std::size_t>(keys));
  std::memset(mask.data_ptr(), 1, static_cast<std::size_t>(keys - std::max<std::int64_t>(keys / 4, 1)));
  return mask;
}

// (1, 1, rows, keys): a quarter of it hidden, at random, or normal numbers.
Tensor dense_mask(const Problem& problem, std::uint64_t seed) {
  if (problem.mask == MaskKind::additive) {
    return NormalTensors(seed, problem.dtype).next({1, 1, problem.seq_q, problem.seq_kv});
  }
  Tensor mask = empty({1, 1, problem.seq_q, problem.seq_kv}, kBool);
  std::minstd_rand generator(static_cast<std::uint32_t>(seed));
  auto* data = static_cast<std::uint8_t*>(mask.data_ptr());
  std::generate_n(data, mask.numel(), [&] { return static_cast<std::uint8_t>((generator() >> 8 & 3) != 0); });
  return mask;
}

// An eighth of the tokens; two at least where one of them is to be padding.
std::int64_t text_tokens(const Problem& problem) {
  const std::int64_t tokens = std::min(problem.seq_q, problem.seq_kv);
  const std::int64_t least = problem.mask == MaskKind::padding ? 2 : 1;
  return std::min(tokens, std::clamp<std::int64_t>(tokens / 8, least, 512));
}

}  // namespace

Tensor NormalTensors::next(const std::vector<std::int64_t>& shape) {
  Tensor result = empty(shape, dtype_);
  const std::int64_t drawn = std::min(result.numel(), kPeriod);
  for (std::int64_t i = 0; i < drawn; ++i) store_element(result.data_ptr(), i, dtype_, normal_(generator_));
  auto* data = static_cast<char*>(result.data_ptr());
  const std::int64_t element = dtype_.bits / 8;
  for (std::int64_t done = drawn; done < result.numel(); done += drawn) {
    const std::int64_t count = std::min(drawn, result.numel() - done);
    std::memcpy(data + done * element, data, static_cast<std::size_t>(count * element));
  }
  return result;
}

void check_host_memory(const Problem& p) {
  const double elements = 2.0 * static_cast<double>(p.batch) * static_cast<double>(p.head_size) *
                          (static_cast<double>(p.num_heads) * static_cast<double>(p.seq_q) +
                           static_cast<double>(p.num_kv_heads) * static_cast<double>(p.seq_kv));
  const double bytes = elements * p.dtype.bits / 8;
  const double memory = static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGESIZE));
  if (bytes > memory) {
    throw MemoryError(
        fmt::format("Shape {} in {} needs {:.1f} GB for query, key, value and output; this machine has "
                    "{:.1f} GB.",
                    shape_name(std::array{p.batch, p.num_heads, p.seq_q, p.seq_kv, p.head_size}), dtype_name(p.dtype),
                    bytes / 1e9, memory / 1e9));
  }
}

RandomCall random_call(const Problem& problem, std::uint64_t seed) {
  if (problem.packed || problem.spans) {
    throw NotImplementedError(
        fmt::format("No typical tensors are known for {}: measure real ones, by tune_call or `ditattn tune --input`.",
                    problem.packed ? "packed sequences" : "spans of full attention"));
  }
  check_host_memory(problem);
  const std::int64_t text = problem.joint ? text_tokens(problem) : 0;
  NormalTensors normal(seed, problem.dtype);
  const auto tensor = [&](std::int64_t tokens, std::int64_t heads) {
    return copy_to(normal.next({problem.batch, tokens, heads, problem.head_size}), problem.device);
  };
  RandomCall call{.query = tensor(problem.seq_q - text, problem.num_heads),
                  .key = tensor(problem.seq_kv - text, problem.num_kv_heads),
                  .value = tensor(problem.seq_kv - text, problem.num_kv_heads),
                  .metadata = {}};
  AttentionMetadataFields fields;
  if (text > 0) {
    fields.joint_query = tensor(text, problem.num_heads);
    fields.joint_key = tensor(text, problem.num_kv_heads);
    fields.joint_value = tensor(text, problem.num_kv_heads);
  }
  if (problem.mask == MaskKind::padding) {
    (text > 0 ? fields.joint_attn_mask : fields.attn_mask) = padding_mask(text > 0 ? text : problem.seq_kv);
  } else if (problem.mask != MaskKind::none) {
    fields.attn_mask = dense_mask(problem, seed);
  }
  if (problem.fp8_kv) fields.extra.Set("kv_cache_dtype", tvm::ffi::String("fp8"));
  if (text > 0 || problem.mask != MaskKind::none || problem.fp8_kv) {
    call.metadata = copy_to(AttentionMetadata(std::move(fields)), problem.device);
  }
  return call;
}

}  // namespace ditattn
