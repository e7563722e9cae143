#include "tests/conformance/inputs.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace ditattn::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kSentinel = 1234;  // exact in every dtype's neighbourhood: compared after the same rounding

using Random = std::mt19937_64;
using Shape = std::array<std::int64_t, 4>;

std::int64_t offset(const Tensor& t, std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) {
  return b * t.stride(0) + s * t.stride(1) + h * t.stride(2) + d * t.stride(3);
}

// Calls use_row(b, s, h) for every row that has memory of its own.
void for_each_row(const Tensor& t, const std::function<void(std::int64_t, std::int64_t, std::int64_t)>& use_row) {
  const std::int64_t batches = t.stride(0) == 0 ? std::min<std::int64_t>(t.size(0), 1) : t.size(0);
  for (std::int64_t b = 0; b < batches; ++b) {
    for (std::int64_t s = 0; s < t.size(1); ++s) {
      for (std::int64_t h = 0; h < t.size(2); ++h) use_row(b, s, h);
    }
  }
}

Tensor view(const Tensor& whole, std::int64_t first, const Shape& shape, const Shape& strides) {
  char* data = static_cast<char*>(whole.data_ptr()) + first * whole.dtype().bits / 8;
  return wrap(data, shape, whole.dtype(), strides);
}

void fill(const Tensor& t, Input input, bool is_query, bool is_value, Random& random) {
  std::normal_distribution<double> normal;
  const double factor = input == Input::huge ? 30 : input == Input::tiny ? 1e-3 : 1;
  const double shift = input == Input::offset && !is_query ? 8 : 0;
  const std::int64_t head_size = t.size(3);
  const std::int64_t outlier = input == Input::outlier && !is_value ? head_size / 2 : -1;
  for_each_row(t, [&](std::int64_t b, std::int64_t s, std::int64_t h) {
    const std::int64_t row = offset(t, b, s, h, 0);
    for (std::int64_t d = 0; d < head_size; ++d) {
      const double value = factor * normal(random) * (d == outlier ? 20 : 1) + shift;
      store_element(t.data_ptr(), row + d, t.dtype(), value);
    }
  });
}

// A mask before its dimensions are dropped: sizes (B, H, Sq, Skv), 1 where broadcast.
struct MaskPlan {
  Shape shape;
  int rank;
  DLDataType dtype;
};

MaskPlan plan_mask(const Case& c) {
  const std::int64_t b = c.batch;
  const std::int64_t h = c.heads;
  const std::int64_t q = c.seq_q;
  const std::int64_t k = c.seq_kv;
  switch (c.mask) {
    case MaskCase::bool_qk:
      return {{1, 1, q, k}, 4, kBool};
    case MaskCase::bool_bhqk:
      return {{b, h, q, k}, 4, kBool};
    case MaskCase::bool_head:
      return {{1, h, q, k}, 3, kBool};
    case MaskCase::bool_head_keys:
      return {{1, h, 1, k}, 4, kBool};
    case MaskCase::bool_batch:
      return {{b, 1, 1, 1}, 4, kBool};
    case MaskCase::additive:
      return {{1, 1, q, k}, 4, c.dtype};
    case MaskCase::additive_head:
      return {{b, h, q, k}, 4, kFloat32};
    case MaskCase::additive_keys:
      return {{b, 1, 1, k}, 4, c.dtype};
    case MaskCase::empty_rows:
      return {{b, 1, q, k}, 4, kBool};
    default:
      return {{b, 1, 1, k}, 2, kBool};
  }
}

// What is added to the logits of one row of the mask: 0, −∞ or a number.
std::vector<double> mask_row(MaskCase mask, std::int64_t keys, const std::vector<char>& never_seen, Random& random) {
  std::uniform_real_distribution<double> uniform;
  std::normal_distribution<double> normal;
  const auto length = static_cast<std::int64_t>(uniform(random) * static_cast<double>(keys + 1));
  const bool empty = mask == MaskCase::empty_rows && uniform(random) < 0.4;
  std::vector<double> row(static_cast<std::size_t>(keys));
  for (std::int64_t j = 0; j < keys; ++j) {
    double& value = row[static_cast<std::size_t>(j)];
    const double chance = uniform(random);
    if (mask == MaskCase::all_true) {
      value = 0;
    } else if (mask == MaskCase::prefix) {
      value = j < length ? 0 : -kInfinity;
    } else if (mask == MaskCase::additive) {
      value = chance < 0.1 && j > 0 ? -1e9 : 2 * normal(random);  // a row of −1e9 alone would drown its logits
    } else {
      const bool hidden = empty || chance < 0.3 || never_seen[static_cast<std::size_t>(j)] != 0;
      value = hidden ? -kInfinity : mask == MaskCase::additive_head ? 2 * normal(random) : 0;
    }
  }
  return row;
}

struct MaskTensor {
  Tensor mask;         // as the backend gets it
  Shape strides = {};  // of (B, H, Sq, Skv)

  [[nodiscard]] bool hides(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    if (!mask.defined()) return false;
    const std::int64_t index = b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3];
    const double value = load_element(mask.data_ptr(), index, mask.dtype());
    return mask.dtype() == kBool ? value == 0 : value == -kInfinity;
  }
};

MaskTensor make_mask(const Case& c, Random& random, std::vector<Storage>& storage) {
  if (c.mask == MaskCase::none) return {};
  const MaskPlan plan = plan_mask(c);
  const auto& [batch, heads, rows, keys] = plan.shape;
  const std::int64_t step = c.layout == Layout::reversed ? 2 : 1;
  Shape strides = {heads * rows * keys * step, rows * keys * step, keys * step, step};
  const Tensor whole = empty({std::max<std::int64_t>(batch * strides[0], 1)}, plan.dtype);
  if (c.layout == Layout::expanded && batch > 1) strides[0] = 0;

  std::bernoulli_distribution rarely(0.15);
  std::vector<char> never_seen(static_cast<std::size_t>(keys));
  for (char& hidden : never_seen) hidden = static_cast<char>(rarely(random));
  const std::int64_t own_batches = strides[0] == 0 ? 1 : batch;
  for (std::int64_t line = 0; line < own_batches * heads * rows; ++line) {
    const std::vector<double> row = mask_row(c.mask, keys, never_seen, random);
    for (std::int64_t j = 0; j < keys; ++j) {
      const double value = row[static_cast<std::size_t>(j)];
      store_element(whole.data_ptr(), line * strides[2] + j * step, plan.dtype,
                    plan.dtype == kBool ? (value == 0 ? 1 : 0) : value);
    }
  }

  const int first = 4 - plan.rank;
  const std::vector<std::int64_t> shape =
      plan.rank == 2 ? std::vector{batch, keys} : std::vector(plan.shape.begin() + first, plan.shape.end());
  const std::vector<std::int64_t> own_strides =
      plan.rank == 2 ? std::vector{strides[0], strides[3]} : std::vector(strides.begin() + first, strides.end());
  MaskTensor result{.mask = wrap(whole.data_ptr(), shape, plan.dtype, own_strides)};
  for (std::size_t i = 0; i < 4; ++i) result.strides[i] = plan.shape[i] == 1 ? 0 : strides[i];
  storage.push_back({.whole = whole, .views = {}});
  return result;
}

// For each own (batch entry, K/V head) and key: how many of the rows that could look at it do.
class Visibility {
 public:
  Visibility(const Case& c, const MaskTensor& mask, CausalAlignment alignment, bool expanded) {
    const std::int64_t shift = alignment == CausalAlignment::bottom_right ? c.seq_kv - c.seq_q : 0;
    batches_ = expanded ? 1 : c.batch;
    heads_ = c.kv_heads;
    keys_ = c.seq_kv;
    seen_.resize(static_cast<std::size_t>(batches_ * heads_ * keys_));
    rows_ = c.batch / std::max<std::int64_t>(batches_, 1) * (c.heads / c.kv_heads) * c.seq_q;
    for (std::int64_t b = 0; b < c.batch; ++b) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        for (std::int64_t i = 0; i < c.seq_q; ++i) {
          const std::int64_t end = c.causal ? std::clamp<std::int64_t>(i + shift + 1, 0, keys_) : keys_;
          for (std::int64_t j = 0; j < end; ++j) {
            if (!mask.hides(b, h, i, j)) ++at(expanded ? 0 : b, h / (c.heads / c.kv_heads), j);
          }
        }
      }
    }
  }
  std::int64_t& at(std::int64_t b, std::int64_t h, std::int64_t j) {
    return seen_[static_cast<std::size_t>((b * heads_ + h) * keys_ + j)];
  }
  // The key that the fewest rows see, but some, and not all; −1 if there is none.
  std::int64_t partly_seen(std::int64_t b, std::int64_t h) {
    std::int64_t best = -1;
    for (std::int64_t j = 0; j < keys_; ++j) {
      const std::int64_t count = at(b, h, j);
      if (count > 0 && count < rows_ && (best < 0 || count < at(b, h, best))) best = j;
    }
    return best;
  }

 private:
  std::int64_t batches_, heads_, keys_, rows_;
  std::vector<std::int64_t> seen_;
};

void plant_nan(const Case& c, const MaskTensor& mask, CausalAlignment alignment, Inputs& inputs, Random& random) {
  if (c.nan == NanCase::none || inputs.key.numel() == 0) return;
  Visibility visibility(c, mask, alignment, inputs.key.stride(0) == 0);
  const double odd[] = {kNan, kInfinity, -kInfinity};
  const auto plant = [&](const Tensor& t, std::int64_t b, std::int64_t j, std::int64_t h, double value) {
    const auto d = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(c.head_size));
    store_element(t.data_ptr(), offset(t, b, j, h, d), t.dtype(), value);
  };
  for_each_row(inputs.key, [&](std::int64_t b, std::int64_t j, std::int64_t h) {
    if (visibility.at(b, h, j) != 0) return;
    plant(inputs.key, b, j, h, odd[random() % 3]);
    plant(inputs.value, b, j, h, odd[random() % 3]);
  });
  if (c.nan != NanCase::some_rows) return;
  const std::int64_t batches = inputs.key.stride(0) == 0 ? 1 : c.batch;
  for (std::int64_t b = 0; b < batches; ++b) {
    for (std::int64_t h = 0; h < c.kv_heads; ++h) {
      const std::int64_t j = visibility.partly_seen(b, h);
      if (j < 0) continue;
      plant(random() % 2 == 0 ? inputs.key : inputs.value, b, j, h, kNan);  // in V only one element of the row shows
    }
  }
}

MaskKind mask_kind(const Case& c) {
  if (c.mask == MaskCase::none || c.mask == MaskCase::all_true) return MaskKind::none;
  const MaskPlan plan = plan_mask(c);
  if (plan.dtype != kBool) return MaskKind::additive;
  return plan.shape[1] == 1 && plan.shape[2] == 1 ? MaskKind::padding : MaskKind::boolean;
}

}  // namespace

Storage make_storage(Layout layout, std::array<std::int64_t, 4> shape, DLDataType dtype, std::int64_t packed_heads) {
  const auto [batch, tokens, heads, head_size] = shape;
  const std::int64_t pitch = layout == Layout::padded ? head_size + 3 : head_size;
  const std::int64_t memory_heads = layout == Layout::packed ? packed_heads : heads;
  Shape strides = {tokens * memory_heads * pitch, memory_heads * pitch, pitch, 1};
  if (layout == Layout::bhsd) strides = {heads * tokens * pitch, pitch, tokens * pitch, 1};
  Storage storage{.whole = empty({batch * tokens * memory_heads * pitch}, dtype), .views = {}};
  if (layout == Layout::expanded) strides[0] = 0;
  std::int64_t first = 0;
  if (layout == Layout::reversed) {
    first = std::max<std::int64_t>(tokens - 1, 0) * strides[1];
    strides[1] = -strides[1];
  }
  for (std::int64_t head = 0; head + heads <= memory_heads; head += heads) {
    storage.views.push_back(view(storage.whole, first + head * pitch, shape, strides));
    if (layout != Layout::packed) break;
  }
  return storage;
}

Problem problem_of(const Case& c) {
  return {.batch = c.batch,
          .num_heads = c.heads,
          .num_kv_heads = c.kv_heads,
          .seq_q = c.seq_q,
          .seq_kv = c.seq_kv,
          .head_size = c.head_size,
          .dtype = c.dtype,
          .mask = mask_kind(c),
          .causal = c.causal,
          .lse = c.lse};
}

Inputs make_inputs(const Case& c, CausalAlignment alignment, std::uint64_t seed) {
  std::seed_seq mixed{static_cast<std::uint64_t>(std::hash<std::string>{}(c.line)), seed};
  Random random(mixed);
  Inputs inputs;
  const Shape q_shape = {c.batch, c.seq_q, c.heads, c.head_size};
  const Shape kv_shape = {c.batch, c.seq_kv, c.kv_heads, c.head_size};
  if (c.layout == Layout::packed && c.seq_q == c.seq_kv) {  // slices of one tensor
    const std::int64_t all_heads = c.heads + 2 * c.kv_heads;
    Storage qkv = make_storage(Layout::packed, kv_shape, c.dtype, all_heads);
    const Tensor& first = qkv.views.front();
    inputs.query = view(qkv.whole, 0, q_shape, {first.stride(0), first.stride(1), first.stride(2), 1});
    inputs.key = qkv.views[qkv.views.size() - 2];
    inputs.value = qkv.views.back();
    inputs.storage.push_back(std::move(qkv));
  } else {
    inputs.storage.push_back(make_storage(c.layout, q_shape, c.dtype, 3 * c.heads));
    inputs.query = inputs.storage.back().views.front();
    inputs.storage.push_back(make_storage(c.layout, kv_shape, c.dtype, 2 * c.kv_heads));
    inputs.key = inputs.storage.back().views.front();
    if (c.layout != Layout::packed) inputs.storage.push_back(make_storage(c.layout, kv_shape, c.dtype, c.kv_heads));
    inputs.value = inputs.storage.back().views.back();
  }
  fill(inputs.query, c.input, true, false, random);
  fill(inputs.key, c.input, false, false, random);
  fill(inputs.value, c.input, false, true, random);
  const MaskTensor mask = make_mask(c, random, inputs.storage);
  plant_nan(c, mask, alignment, inputs, random);
  if (mask.mask.defined()) inputs.metadata = AttentionMetadata({.attn_mask = mask.mask});
  return inputs;
}

Outputs make_outputs(const Case& c) {
  Outputs outputs;
  if (c.out_given) {
    const Layout layout = c.layout == Layout::expanded ? Layout::contiguous : c.layout;  // out may not overlap itself
    outputs.out = make_storage(layout, {c.batch, c.seq_q, c.heads, c.head_size}, c.dtype, 2 * c.heads);
    for (std::int64_t i = 0; i < outputs.out.whole.numel(); ++i) {
      store_element(outputs.out.whole.data_ptr(), i, c.dtype, kSentinel);
    }
    outputs.given.out = outputs.out.views.back();
  }
  if (c.lse) {
    outputs.lse = empty({c.batch * c.heads * c.seq_q}, kFloat32);
    auto* data = static_cast<float*>(outputs.lse.data_ptr());
    std::fill_n(data, outputs.lse.numel(), static_cast<float>(kSentinel));
    const bool transposed = c.layout != Layout::contiguous;  // (B, Sq, H) in memory
    outputs.given.lse = wrap(data, {c.batch, c.heads, c.seq_q}, kFloat32,
                             {c.heads * c.seq_q, transposed ? 1 : c.seq_q, transposed ? c.heads : 1});
  }
  return outputs;
}

Storage copy_to(const Storage& storage, DLDevice device) {
  if (storage.whole.device().device_type == device.device_type) return storage;
  Storage copy{.whole = ditattn::copy_to(storage.whole, device), .views = {}};
  for (const Tensor& view : storage.views) {
    const std::ptrdiff_t first = static_cast<char*>(view.data_ptr()) - static_cast<char*>(storage.whole.data_ptr());
    copy.views.push_back(wrap(static_cast<char*>(copy.whole.data_ptr()) + first,
                              {view.shape().data(), static_cast<std::size_t>(view.ndim())}, view.dtype(),
                              {view.strides().data(), static_cast<std::size_t>(view.ndim())}, device));
  }
  return copy;
}

Inputs copy_to(const Inputs& inputs, DLDevice device) {
  if (device.device_type == kDLCPU) return inputs;
  Inputs copy;
  copy.query = ditattn::copy_to(inputs.query, device);
  copy.key = ditattn::copy_to(inputs.key, device);
  copy.value = ditattn::copy_to(inputs.value, device);
  copy.metadata = ditattn::copy_to(inputs.metadata, device);
  return copy;
}

std::int64_t count_overwritten(const Storage& out) {
  const Tensor& view = out.views.back();
  const DLDataType dtype = view.dtype();
  std::vector<char> inside(static_cast<std::size_t>(out.whole.numel()));
  const std::int64_t first =
      (static_cast<char*>(view.data_ptr()) - static_cast<char*>(out.whole.data_ptr())) / (dtype.bits / 8);
  for_each_row(view, [&](std::int64_t b, std::int64_t s, std::int64_t h) {
    std::fill_n(inside.begin() + first + offset(view, b, s, h, 0), view.size(3), 1);
  });
  std::uint64_t stored = 0;
  store_element(&stored, 0, dtype, kSentinel);
  const double sentinel = load_element(&stored, 0, dtype);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < out.whole.numel(); ++i) {
    if (inside[static_cast<std::size_t>(i)] == 0 && load_element(out.whole.data_ptr(), i, dtype) != sentinel) ++count;
  }
  return count;
}

}  // namespace ditattn::conformance
