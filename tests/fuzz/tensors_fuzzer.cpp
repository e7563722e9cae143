// Calls with tensors as any DLPack producer may make them: every part of a valid call may be bent. What the library
// takes is computed, in memory that reaches exactly as far as shape and strides say.

#include <ditattn/ditattn.hpp>
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>

#include "tests/fuzz/fuzzing.hpp"

namespace {

using ditattn::Tensor;

constexpr std::int64_t kMostBytes = 1 << 16;     // of a tensor's memory
constexpr std::int64_t kMostProducts = 1 << 20;  // of a call that is computed

// Numbers near which sums and products go wrong.
constexpr std::array<std::int64_t, 12> kOddNumbers = {
    0, 1, -1, 2, 3, 7, 64, 1 << 20, std::int64_t{1} << 32, std::int64_t{1} << 62, INT64_MAX, INT64_MIN};
constexpr std::array kTypes = {ditattn::kFloat32,
                               ditattn::kFloat16,
                               ditattn::kBFloat16,
                               ditattn::kBool,
                               ditattn::kInt32,
                               ditattn::kFloat64,
                               DLDataType{kDLFloat, 32, 4},
                               DLDataType{kDLInt, 4, 1},
                               DLDataType{kDLFloat, 0, 1},
                               DLDataType{200, 255, 0}};
constexpr std::array kDevices = {DLDevice{kDLCPU, 0}, DLDevice{kDLCPU, 1}, DLDevice{kDLCUDA, 0}, DLDevice{kDLCUDA, -1},
                                 DLDevice{static_cast<DLDeviceType>(99), 7}};

struct Description {
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // empty: the producer gives none
  DLDataType dtype;
  DLDevice device = ditattn::kCpu;
  std::int64_t byte_offset = 0;
  bool is_null = false;
};

Description contiguous(std::vector<std::int64_t> shape, DLDataType dtype) {
  Description description{.shape = std::move(shape), .strides = {}, .dtype = dtype};
  std::int64_t stride = 1;
  for (auto extent = description.shape.rbegin(); extent != description.shape.rend(); ++extent) {
    description.strides.insert(description.strides.begin(), stride);
    stride *= std::max<std::int64_t>(*extent, 1);
  }
  return description;
}

std::int64_t draw_number(FuzzedDataProvider& bytes) {
  return bytes.ConsumeBool() ? bytes.PickValueInArray(kOddNumbers)
                             : bytes.ConsumeIntegralInRange<std::int64_t>(-70, 70);
}

void bend(FuzzedDataProvider& bytes, Description& tensor) {
  const auto place = [&] { return bytes.ConsumeIntegralInRange<std::size_t>(0, tensor.shape.size() - 1); };
  const bool is_bendable = !tensor.shape.empty() && tensor.strides.size() == tensor.shape.size();
  switch (bytes.ConsumeIntegralInRange(0, 9)) {
    case 0:
      if (is_bendable) tensor.shape[place()] = draw_number(bytes);
      break;
    case 1:
      if (is_bendable) tensor.strides[place()] = draw_number(bytes);
      break;
    case 2:
      tensor.shape.insert(tensor.shape.begin(), 1);
      if (!tensor.strides.empty()) tensor.strides.insert(tensor.strides.begin(), draw_number(bytes));
      break;
    case 3:
      if (!tensor.shape.empty()) tensor.shape.pop_back();
      if (!tensor.strides.empty()) tensor.strides.pop_back();
      break;
    case 4:
      tensor.dtype = bytes.PickValueInArray(kTypes);
      break;
    case 5:
      tensor.device = bytes.PickValueInArray(kDevices);
      break;
    case 6:
      tensor.byte_offset = bytes.ConsumeIntegralInRange<std::int64_t>(0, 70);
      break;
    case 7:
      tensor.is_null = true;
      break;
    case 8:
      if (is_bendable) {  // backwards
        const std::size_t at = place();
        if (tensor.strides[at] != INT64_MIN) tensor.strides[at] = -tensor.strides[at];
      }
      break;
    default:
      tensor.strides.clear();
  }
}

// Bytes below and above the first element that the tensor reaches, where they can be had.
struct Reach {
  std::int64_t below = 0;
  std::int64_t above = 0;
};

// None: more than can be addressed (which the library must refuse) or than is worth having.
std::optional<Reach> reach_of(const Description& tensor) {
  const auto item = static_cast<__int128>((tensor.dtype.bits * tensor.dtype.lanes + 7) / 8);
  __int128 below = 0;
  __int128 above = item;
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
    if (tensor.shape[i] <= 0) return Reach{};  // no elements, or malformed
    const __int128 stride = tensor.strides.empty() ? 0 : tensor.strides[i];
    const __int128 span = stride * (tensor.shape[i] - 1) * item;
    (span < 0 ? below : above) += span < 0 ? -span : span;
    if (tensor.strides.empty()) above *= tensor.shape[i];
    if (below > kMostBytes || above > kMostBytes) return std::nullopt;
  }
  return Reach{static_cast<std::int64_t>(below), static_cast<std::int64_t>(above)};
}

// Whether shape or strides are beyond 64 bits: then no memory is needed, as the library must refuse it.
bool is_beyond_addresses(const Description& tensor) {
  __int128 count = 1;
  for (const std::int64_t extent : tensor.shape) {
    if (extent <= 0) return extent < 0;
    count = std::min<__int128>(count * extent, INT64_MAX + __int128{1});
  }
  return count > INT64_MAX / 32;
}

// Owns what a producer's tensor points to.
struct Produced {
  DLManagedTensor managed = {};
  Description description;
  std::unique_ptr<char[]> memory;
};

// Whether tvm-ffi, which fills in strides where a producer gives none, multiplies past 64 bits over it. That is its
// own.
bool overflows_in_tvm_ffi(const Description& description) {
  std::int64_t stride = 1;
  return description.strides.empty() &&
         std::any_of(description.shape.rbegin(), description.shape.rend(),
                     [&](std::int64_t size) { return __builtin_mul_overflow(stride, size, &stride); });
}

// A tensor of the description; null where memory would be too large.
Tensor produce(FuzzedDataProvider& bytes, const Description& description) {
  const auto reach = reach_of(description);
  if (!reach && !is_beyond_addresses(description)) return {};
  if (overflows_in_tvm_ffi(description)) return {};
  auto* produced = new Produced{.managed = {}, .description = description, .memory = nullptr};
  char* first = nullptr;
  if (!description.is_null) {
    const std::int64_t size = reach ? reach->below + reach->above : 1;
    produced->memory = std::make_unique<char[]>(static_cast<std::size_t>(size));
    const std::string content = bytes.ConsumeBytesAsString(8);
    for (std::int64_t i = 0; i < size && !content.empty(); ++i)
      produced->memory[i] = content[static_cast<std::size_t>(i * 7 % 61) % content.size()];
    first = produced->memory.get() + (reach ? reach->below : 0) - description.byte_offset;
  }
  produced->managed = {
      .dl_tensor = {.data = first,
                    .device = description.device,
                    .ndim = static_cast<int>(description.shape.size()),
                    .dtype = description.dtype,
                    .shape = produced->description.shape.data(),
                    .strides = description.strides.empty() ? nullptr : produced->description.strides.data(),
                    .byte_offset = static_cast<std::uint64_t>(description.byte_offset)},
      .manager_ctx = produced,
      .deleter = [](DLManagedTensor* self) { delete static_cast<Produced*>(self->manager_ctx); }};
  return Tensor::FromDLPack(&produced->managed);
}

// The parts of one call, which start valid; the bytes say what is bent.
class Call {
 public:
  explicit Call(FuzzedDataProvider& bytes) : bytes_(bytes) {
    for (std::int64_t* size : {&batch_, &kv_heads_, &rows_, &keys_}) *size = size_of(9);
    if (bytes_.ConsumeBool()) keys_ += 60;
    heads_ = kv_heads_ * size_of(3);
    head_size_ = bytes_.ConsumeBool() ? 64 : size_of(20);
    dtype_ = kTypes[bytes_.ConsumeIntegralInRange<std::size_t>(0, 2)];
    config_ = {.num_heads = heads_, .head_size = head_size_, .causal = bytes_.ConsumeBool(), .num_kv_heads = kv_heads_};
    if (one_in(8)) config_.softmax_scale = bytes_.ConsumeFloatingPoint<double>();
    if (one_in(16)) config_.num_heads = draw_number(bytes_);
    if (one_in(16)) config_.head_size = draw_number(bytes_);
    if (one_in(16)) config_.num_kv_heads = draw_number(bytes_);
  }

  // False where a tensor was too large to be had.
  bool run(const ditattn::BackendClass& backend) {
    const Tensor query = tensor({batch_, rows_, heads_, head_size_}, dtype_);
    const Tensor key = tensor({batch_, keys_, kv_heads_, head_size_}, dtype_);
    const Tensor value = one_in(4) ? key : tensor({batch_, keys_, kv_heads_, head_size_}, dtype_);
    ditattn::AttentionMetadataFields fields = draw_fields();
    const std::int64_t rows = rows_ + joint_rows_;
    ditattn::ForwardOutputs outputs;
    if (bytes_.ConsumeBool()) outputs.out = one_in(8) ? query : tensor({batch_, rows, heads_, head_size_}, dtype_);
    if (bytes_.ConsumeBool()) outputs.lse = tensor({batch_, heads_, rows}, ditattn::kFloat32);
    if (is_too_large_ || batch_ * heads_ * rows * (keys_ + joint_keys_) * head_size_ > kMostProducts) return false;
    backend->make(config_)->forward(query, key, value, ditattn::AttentionMetadata(std::move(fields)), outputs);
    return true;
  }

 private:
  bool one_in(int count) { return bytes_.ConsumeIntegralInRange(1, count) == count; }
  std::int64_t size_of(std::int64_t most) { return bytes_.ConsumeIntegralInRange<std::int64_t>(0, most); }

  Tensor tensor(std::vector<std::int64_t> shape, DLDataType dtype) {
    Description description = contiguous(std::move(shape), dtype);
    while (one_in(8)) bend(bytes_, description);
    Tensor produced = produce(bytes_, description);
    is_too_large_ = is_too_large_ || !produced.defined();
    return produced;
  }

  Tensor mask(std::int64_t rows, std::int64_t keys) {
    const DLDataType dtype = one_in(3) ? dtype_ : ditattn::kBool;
    switch (bytes_.ConsumeIntegralInRange(0, 4)) {
      case 0:
        return tensor({batch_, keys}, dtype);
      case 1:
        return tensor({batch_, 1, rows, keys}, dtype);
      case 2:
        return tensor({heads_, 1, keys}, dtype);
      case 3:
        return tensor({keys}, dtype);
      default:
        return tensor({1, 1, 1, 1}, dtype);
    }
  }

  Tensor offsets(std::int64_t tokens) {
    const std::int64_t total = std::clamp<std::int64_t>(tokens, INT32_MIN, INT32_MAX);
    const std::int64_t parts = size_of(3) + 1;
    if (one_in(8)) return tensor({parts + 1}, ditattn::kInt32);
    std::vector<std::int64_t> cuts = {0, total};
    for (std::int64_t i = 1; i < parts; ++i) cuts.push_back(size_of(std::max<std::int64_t>(total, 0)));
    std::ranges::sort(cuts);
    Tensor made = ditattn::empty({parts + 1}, ditattn::kInt32);
    for (std::int64_t i = 0; i <= parts; ++i)
      ditattn::store_element(made.data_ptr(), i, ditattn::kInt32,
                             static_cast<double>(cuts[static_cast<std::size_t>(i)]));
    return made;
  }

  ditattn::AttentionMetadataFields draw_fields() {
    ditattn::AttentionMetadataFields fields;
    std::int64_t keys = keys_;
    if (one_in(4)) fields.extra.Set("valid_kv_length", keys = one_in(4) ? draw_number(bytes_) : size_of(keys_));
    if (one_in(3)) {
      joint_rows_ = size_of(5);
      joint_keys_ = size_of(5);
      fields.joint_query = tensor({batch_, joint_rows_, heads_, head_size_}, dtype_);
      fields.joint_key = tensor({batch_, joint_keys_, kv_heads_, head_size_}, dtype_);
      if (!one_in(8)) fields.joint_value = tensor({batch_, joint_keys_, kv_heads_, head_size_}, dtype_);
      if (bytes_.ConsumeBool()) fields.joint_strategy = one_in(8) ? "middle" : "rear";
      if (one_in(3)) fields.joint_attn_mask = mask(rows_ + joint_rows_, joint_keys_);
    }
    if (one_in(2)) {
      const bool joined = one_in(3);
      fields.attn_mask = mask(rows_ + (joined ? joint_rows_ : 0), keys_ + (joined ? joint_keys_ : 0));
    }
    if (one_in(4)) {
      fields.extra.Set("cu_seqlens_q", offsets(rows_));
      fields.extra.Set("cu_seqlens_k", offsets(keys));
      fields.extra.Set("max_seqlen_q", one_in(4) ? draw_number(bytes_) : rows_);
      if (!one_in(8)) fields.extra.Set("max_seqlen_k", keys_);
    }
    if (one_in(4)) {
      fields.full_attn_spans.emplace();
      while (one_in(2)) {
        fields.full_attn_spans->emplace_back();
        while (one_in(2)) fields.full_attn_spans->back().push_back({draw_number(bytes_), draw_number(bytes_)});
      }
      while (one_in(4)) fields.query_ranges.push_back({draw_number(bytes_), draw_number(bytes_), draw_number(bytes_)});
    }
    return fields;
  }

  FuzzedDataProvider& bytes_;
  std::int64_t batch_ = 0, kv_heads_ = 0, heads_ = 0, rows_ = 0, keys_ = 0, head_size_ = 0;
  std::int64_t joint_rows_ = 0, joint_keys_ = 0;
  DLDataType dtype_ = ditattn::kFloat32;
  ditattn::ImplConfig config_;
  bool is_too_large_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using Enum = ditattn::DiffusionAttentionBackendEnum;
  static const std::array backends = {Enum::FLASH_ATTN.get_class(), Enum::TORCH_SDPA.get_class(),
                                      Enum::SAGE_ATTN.get_class(), Enum::SAGE_ATTN_3.get_class()};
  FuzzedDataProvider bytes(data, size);
  const ditattn::BackendClass& backend = backends[bytes.ConsumeIntegralInRange<std::size_t>(0, backends.size() - 1)];
  bool is_had = true;
  ditattn::fuzzing::allow_errors([&] { is_had = Call(bytes).run(backend); });
  return is_had ? 0 : -1;  // -1: not kept
}
