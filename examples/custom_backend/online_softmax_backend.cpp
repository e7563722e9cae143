// acme.attention.OnlineSoftmaxBackend: float32 attention on the CPU with an online softmax, one query row at a time.
//
// A row's keys are visited once. Their logits' maximum so far is subtracted before the exponential, and when a larger
// one comes, what was added up is scaled down (Milakov and Gimelshein, 2018). The library has checked the call against
// the capabilities below, and its plan says which keys each row sees, whatever the metadata made of them.

#include <ditattn/plugin.hpp>
#include <ditattn/threads.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

namespace {

using namespace ditattn;

constexpr std::int64_t kMaxHeadSize = 256;
constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Token (b, row, head) of a (B, S, H, D) tensor: D floats in a row.
float* token(const Tensor& tensor, std::int64_t b, std::int64_t row, std::int64_t head) {
  return static_cast<float*>(data_pointer(tensor)) + b * tensor.stride(0) + row * tensor.stride(1) +
         head * tensor.stride(2);
}

// What is added up over the keys of one row, in float64: long sums keep their digits.
class OnlineSoftmax {
 public:
  explicit OnlineSoftmax(std::int64_t head_size) : head_size_(head_size) {}

  void add(double logit, const float* value) {
    if (logit == -kInfinity) return;  // weighs nothing
    if (logit > max_) {
      const double shrink = std::exp(max_ - logit);  // 0 at the first key
      for (std::int64_t d = 0; d < head_size_; ++d) sums_[d] *= shrink;
      total_ *= shrink;
      max_ = logit;
    }
    const double weight = std::exp(logit - max_);
    for (std::int64_t d = 0; d < head_size_; ++d) sums_[d] += weight * value[d];
    total_ += weight;
  }

  // A row without keys gives zeros and an LSE of −∞.
  void write(float* out) const {
    for (std::int64_t d = 0; d < head_size_; ++d) out[d] = total_ == 0 ? 0.F : static_cast<float>(sums_[d] / total_);
  }
  [[nodiscard]] float lse() const { return static_cast<float>(max_ + std::log(total_)); }

 private:
  std::int64_t head_size_;
  double max_ = -kInfinity;
  double total_ = 0;
  std::array<double, kMaxHeadSize> sums_ = {};  // the first head_size_ of them
};

// One forward call, one task per batch entry, head and row.
class Call {
 public:
  Call(const AttentionCall& call, const AttentionImpl& impl)
      : call_(call),
        plan_(call.plan(impl.config().causal, kAlignment)),
        scale_(impl.softmax_scale()),
        heads_(call.query.size(2)),
        group_(heads_ / call.key.size(2)) {}

  void run() const {
    const auto body = [](void* self, std::int64_t task) { static_cast<const Call*>(self)->run_row(task); };
    parallel_for(call_.query.size(0) * heads_ * plan_.total_rows, body, const_cast<Call*>(this));
  }

 private:
  void run_row(std::int64_t task) const {
    const std::int64_t row = task % plan_.total_rows;
    const std::int64_t head = task / plan_.total_rows % heads_;
    const std::int64_t b = task / plan_.total_rows / heads_;
    const QuerySegment& segment = plan_.queries[plan_.num_queries == 2 && row >= plan_.queries[1].first_row ? 1 : 0];
    const float* query = token(segment.tensor, b, row - segment.first_row, head);

    OnlineSoftmax softmax(call_.query.size(3));
    for (int i = 0; i < plan_.num_keys; ++i) add_keys(plan_.keys[i], query, b, head, row, softmax);
    softmax.write(token(call_.out, b, row, head));
    if (call_.lse.defined()) {
      const Tensor& lse = call_.lse;
      static_cast<float*>(data_pointer(lse))[b * lse.stride(0) + head * lse.stride(1) + row * lse.stride(2)] =
          softmax.lse();
    }
  }

  // Hidden keys are not read: what stands there, NaN included, never shows.
  void add_keys(const KeySegment& segment, const float* query, std::int64_t b, std::int64_t head, std::int64_t row,
                OnlineSoftmax& softmax) const {
    const auto [begin, end] = visible(segment, b, row);
    const std::int64_t head_size = call_.query.size(3);
    for (std::int64_t j = begin; j < end; ++j) {
      const double bias = mask(segment.mask, b, head, row, j);
      if (bias == -kInfinity) continue;
      const float* key = token(segment.key, b, j, head / group_);
      const double dot = std::transform_reduce(query, query + head_size, key, 0.);
      softmax.add(scale_ * dot + bias, token(segment.value, b, j, head / group_));
    }
  }

  // Keys [begin, end) of a segment, relative to it, that a row may see, masks aside.
  [[nodiscard]] std::pair<std::int64_t, std::int64_t> visible(const KeySegment& segment, std::int64_t b,
                                                              std::int64_t row) const {
    std::int64_t begin = 0;
    std::int64_t end = segment.keys;
    if (segment.prefix != nullptr) {
      const std::vector<std::int64_t>& lengths = segment.prefix->kv_lengths;
      end = std::min(end, lengths[lengths.size() == 1 ? 0 : static_cast<std::size_t>(b)] - segment.length_offset);
    }
    if (plan_.ranges) {  // spans, packed sequences
      const std::int64_t* range = plan_.ranges->bounds.data() + b * plan_.ranges->batch_stride + 2 * row;
      begin = std::max(begin, range[0] - segment.first_key);
      end = std::min(end, range[1] - segment.first_key);
    } else if (plan_.causal) {
      end = std::min(end, row + plan_.causal_offset + 1 - segment.first_key);
    }
    return {begin, end};
  }

  // What is added to the logit; −∞ where the key is hidden.
  static double mask(const MaskView& mask, std::int64_t b, std::int64_t head, std::int64_t row, std::int64_t key) {
    const std::int64_t mask_row = row - mask.first_row;
    if (mask.data == nullptr || mask_row < 0 || mask_row >= mask.rows) return 0;
    const auto& s = mask.strides;
    const double element = load_element(mask.data, b * s[0] + head * s[1] + mask_row * s[2] + key * s[3], mask.dtype);
    if (mask.dtype == kBool) return element != 0 ? 0 : -kInfinity;
    return element;
  }

  const AttentionCall& call_;
  CallPlan plan_;
  double scale_;
  std::int64_t heads_;
  std::int64_t group_;  // query heads per K/V head
};

class OnlineSoftmaxImpl final : public AttentionImpl {
 public:
  using AttentionImpl::AttentionImpl;
  void run(const AttentionCall& call) const override { Call(call, *this).run(); }
};

class OnlineSoftmaxBackend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "ONLINE_SOFTMAX"; }

  // What is not declared here is refused by the library, with the value and what would do.
  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can{.engine = "online softmax, row by row",
                                  .devices = {"cpu"},
                                  .dtypes = {kFloat32},
                                  .head_sizes = {.list = {}, .max = kMaxHeadSize},
                                  .masks = {"padding", "bool", "additive", "spans"},
                                  .gqa = true,
                                  .causal = true,
                                  .causal_alignment = kAlignment,
                                  .lse = true,
                                  .packed = true,
                                  .joint = true};
    return can;
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<OnlineSoftmaxImpl>(config);
  }
};

BackendClass find(std::string_view class_name) {
  static const BackendClass backend = std::make_shared<OnlineSoftmaxBackend>();
  return class_name == "OnlineSoftmaxBackend" ? backend : nullptr;
}

}  // namespace

DITATTN_EXPORT_BACKENDS(find)
