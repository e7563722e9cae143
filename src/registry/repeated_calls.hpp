#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "ditattn/backend.hpp"

namespace ditattn {

/// A call that has nothing but tensors.
struct PlainCall {
  const AttentionImpl& impl;
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const Tensor& out;  ///< may be null
};

/// Background: a model makes the same calls hundreds of times, of which only the addresses differ. Approach: what was
/// checked once, and taken by a class without state, is not looked at again where sizes, strides, dtypes and devices
/// are those of a call before; addresses are. A thread has its own.
class RepeatedCalls {
 public:
  /// The problem of a call like one that was added; null: it is to be checked.
  [[nodiscard]] const Problem* find(const PlainCall& call) const;
  /// Of a call that was checked.
  void add(const PlainCall& call, const Problem& problem);

 private:
  /// A tensor of rank 4, but for its address.
  struct Layout {
    std::array<std::int64_t, 4> sizes{};
    std::array<std::int64_t, 4> strides{};
    std::int64_t begin = 0;  ///< of its memory, in bytes from its first element
    std::int64_t end = 0;
    std::intptr_t low_bits = 0;  ///< of its address: what its alignment comes of
    [[nodiscard]] bool is_of(const Tensor& tensor, const Problem& problem) const;
  };
  struct Entry {
    Problem problem;
    std::uint64_t changes = 0;  ///< registrations
    bool has_out = false;
    std::array<Layout, 4> layouts;                  ///< of query, key, value and out
    std::weak_ptr<const AttentionBackend> backend;  ///< an address alone could come again
  };
  static std::size_t place_of(const Tensor& query, const Tensor& key);

  std::array<Entry, 8> entries_;
};

/// This thread's.
RepeatedCalls& repeated_calls();

}  // namespace ditattn
