#include "registry/repeated_calls.hpp"

#include <algorithm>

#include "registry/check_tensor.hpp"
#include "registry/enum.hpp"
#include "registry/memory_overlap.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

constexpr std::intptr_t kLowBits = 15;

std::intptr_t address_of(const Tensor& tensor) { return reinterpret_cast<std::intptr_t>(data_pointer(tensor)); }

}  // namespace

RepeatedCalls& repeated_calls() {
  static thread_local RepeatedCalls calls;
  return calls;
}

std::size_t RepeatedCalls::place_of(const Tensor& query, const Tensor& key) {
  const auto tokens = [](const Tensor& of) { return static_cast<std::uint64_t>(Extent(of).sizes[1]); };
  return (tokens(query) * 5 + tokens(key)) % std::tuple_size_v<decltype(entries_)>;
}

bool RepeatedCalls::Layout::is_of(const Tensor& tensor, const Problem& problem) const {
  const Extent extent(tensor);
  return extent.rank == 4 && std::equal(sizes.begin(), sizes.end(), extent.sizes) &&
         std::equal(strides.begin(), strides.end(), extent.strides) && tensor.dtype() == problem.dtype &&
         same_device(tensor.device(), problem.device) && tensor.data_ptr() != nullptr &&
         (address_of(tensor) & kLowBits) == low_bits;
}

const Problem* RepeatedCalls::find(const PlainCall& call) const {
  if (!call.query.defined() || !call.key.defined() || !call.value.defined()) return nullptr;
  if (call.query.ndim() != 4 || call.key.ndim() != 4) return nullptr;
  const Entry& entry = entries_[place_of(call.query, call.key)];
  const Problem& problem = entry.problem;
  const ImplConfig& config = call.impl.config();
  const BackendClass& backend = BackendAccess::backend(call.impl);
  if (entry.backend.owner_before(backend) || backend.owner_before(entry.backend) ||
      entry.changes != registration_changes() || entry.has_out != call.out.defined() ||
      problem.num_heads != config.num_heads || problem.num_kv_heads != call.impl.num_kv_heads() ||
      problem.head_size != config.head_size || problem.causal != config.causal) {
    return nullptr;
  }
  const auto has = [&](std::size_t i, const Tensor& tensor) { return entry.layouts[i].is_of(tensor, problem); };
  if (!has(0, call.query) || !has(1, call.key) || !has(2, call.value)) return nullptr;
  if (!entry.has_out) return &problem;
  if (!has(3, call.out)) return nullptr;
  const auto range = [&](std::size_t i, const Tensor& tensor) {
    const std::intptr_t address = address_of(tensor);
    return MemoryRange{.begin = address + entry.layouts[i].begin, .end = address + entry.layouts[i].end};
  };
  const MemoryRange out = range(3, call.out);
  const bool meets =
      out.meets(range(0, call.query)) || out.meets(range(1, call.key)) || out.meets(range(2, call.value));
  return meets ? nullptr : &problem;  // a closer look is needed
}

void RepeatedCalls::add(const PlainCall& call, const Problem& problem) {
  const auto layout_of = [](const Tensor& tensor) {
    Layout layout;
    const Extent extent(tensor);
    std::copy_n(extent.sizes, layout.sizes.size(), layout.sizes.begin());
    std::copy_n(extent.strides, layout.strides.size(), layout.strides.begin());
    const MemoryRange range = range_of(tensor);
    const std::intptr_t address = address_of(tensor);
    layout.begin = range.begin - address;
    layout.end = range.end - address;
    layout.low_bits = address & kLowBits;
    return layout;
  };
  Entry& entry = entries_[place_of(call.query, call.key)];
  entry = {.problem = problem,
           .changes = registration_changes(),
           .has_out = call.out.defined(),
           .layouts = {layout_of(call.query), layout_of(call.key), layout_of(call.value),
                       call.out.defined() ? layout_of(call.out) : Layout()},
           .backend = BackendAccess::backend(call.impl)};
}

}  // namespace ditattn
