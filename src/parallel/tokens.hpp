#pragma once

/// Tensors (batch, tokens, heads, size) as ranks exchange them: token after token, so that what comes from several
/// ranks is one tensor, in place.

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "ditattn/communicator.hpp"
#include "ditattn/tensor.hpp"
#include "ditattn/threads.hpp"

namespace ditattn::parallel {

struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::int64_t size() const { return end - begin; }
  friend bool operator==(const Range&, const Range&) = default;
};

/// Part `index` of `total` things cut into `parts` as even as can be: the first ones have one more.
Range share(std::int64_t total, std::int64_t parts, std::int64_t index);

/// A part of one dimension, in place. Of what `tensor` holds nothing is kept alive.
Tensor slice(const Tensor& tensor, int dimension, Range range);

/// A tensor (batch, tokens, heads, size) over memory that has all of a token's numbers together: (tokens, batch, heads,
/// size).
Tensor token_major(void* data, std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t size,
                   DLDataType dtype, DLDevice device = kCpu);

/// The same over other memory.
Tensor token_major_like(const Tensor& tensor, void* data);

/// An LSE (batch, heads, tokens) as (batch, tokens, heads, 1), and back.
Tensor lse_as_tokens(const Tensor& lse);
Tensor tokens_as_lse(const Tensor& tokens);

/// Whether memory has one token after the other, as `token_major` does.
bool is_token_major(const Tensor& tensor);

/// On a GPU in this thread's stream, all in one go.
void copy(std::span<const TokenCopy> copies);
inline void copy(const Tensor& to, const Tensor& from) { copy(std::array{TokenCopy{.to = to, .from = from}}); }

/// Bytes of its numbers.
std::int64_t bytes_of(const Tensor& tensor);

/// Calls body(batch, token) for all of them, in parallel where there is much to do.
template <class Body>
void for_each_token(const Tensor& tensor, const Body& body) {
  struct Work {
    const Body& body;
    std::int64_t tokens, total, step;
  };
  constexpr std::int64_t elements_per_task = 1 << 15;  // per task: some 10 µs
  const std::int64_t per_token = std::max<std::int64_t>(tensor.size(2) * tensor.size(3), 1);
  Work work{.body = body,
            .tokens = tensor.size(1),
            .total = tensor.size(0) * tensor.size(1),
            .step = std::max<std::int64_t>(elements_per_task / per_token, 1)};
  const auto run = [](void* context, std::int64_t index) {
    const Work& all = *static_cast<Work*>(context);
    const std::int64_t end = std::min((index + 1) * all.step, all.total);
    for (std::int64_t i = index * all.step; i < end; ++i) all.body(i / all.tokens, i % all.tokens);
  };
  parallel_for((work.total + work.step - 1) / work.step, run, &work);
}

/// First element of a token's head.
inline std::int64_t offset_of(const Tensor& tensor, std::int64_t batch, std::int64_t token, std::int64_t head) {
  return batch * tensor.stride(0) + token * tensor.stride(1) + head * tensor.stride(2);
}

}  // namespace ditattn::parallel
