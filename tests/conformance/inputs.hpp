#pragma once

/// Tensors for a case: random values in the case's layout, its mask, and NaN where it wants them.

#include <ditattn/ditattn.hpp>

#include <random>
#include <vector>

#include "tests/conformance/case.hpp"

namespace ditattn::conformance {

/// Memory that one or several views lie in.
struct Storage {
  Tensor whole;  ///< one dimension
  std::vector<Tensor> views;
};

/// A view (B, S, heads, D) of new memory in `layout`. Packed views are slices of a tensor with `packed_heads` heads.
Storage make_storage(Layout layout, std::array<std::int64_t, 4> shape, DLDataType dtype, std::int64_t packed_heads);

/// What a backend is asked for the case.
Problem problem_of(const Case& c);

struct Inputs {
  std::vector<Storage> storage;
  Tensor query, key, value;
  AttentionMetadata metadata{nullptr};
};

/// The same values for the same case line and seed. `alignment` matters only to where NaN is hidden.
Inputs make_inputs(const Case& c, CausalAlignment alignment, std::uint64_t seed);

/// Where a conformance run's `out` and `lse` go; null tensors where the case does not give them.
struct Outputs {
  Storage out;
  Tensor lse;  ///< the memory of `given.lse`
  ForwardOutputs given;
};
Outputs make_outputs(const Case& c);

/// The same memory and views on another device; on their own, these themselves.
Storage copy_to(const Storage& storage, DLDevice device);
/// Query, key, value and metadata only.
Inputs copy_to(const Inputs& inputs, DLDevice device);

/// Elements of the memory around a given `out` that the backend changed.
std::int64_t count_overwritten(const Storage& out);

}  // namespace ditattn::conformance
