#include "parallel/agreement.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <exception>
#include <numeric>
#include <string_view>

#include "core/cuda_driver.hpp"
#include "parallel/error_text.hpp"
#include "registry/check_call.hpp"

namespace ditattn::parallel {
namespace {

// What ranks tell each other. All but the first four must be the same everywhere.
enum Field : std::uint8_t {
  text_bytes,  // of this rank's error; 0: none
  rows,
  keys,
  multiprocessors,  // of this rank's GPU; 0: on a CPU
  batch,
  heads,
  kv_heads,
  head_size,
  dtype,
  joint_rows,
  joint_keys,
  valid_keys,
  lse_wanted,
  layer_hash,
  joint_hash,
  mask_hash,
  joint_mask_hash,
  key_options_hash,
  field_count
};
constexpr std::array<const char*, field_count> kFieldNames = {
    "",
    "",
    "",
    "",
    "batch",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "dtype (by code and bits)",
    "joint_query's tokens",
    "joint_key's tokens",
    "valid_kv_length",
    "whether an LSE is wanted",
    "the layer (back end, softmax_scale, causal)",
    "the joint tensors (shapes, dtypes, joint_strategy)",
    "attn_mask (shape, dtype, lengths)",
    "joint_attn_mask (shape, dtype, lengths)",
    "full_attn_spans, query_ranges, cu_seqlens or kv_cache_dtype"};
using Header = CallNumbers;
static_assert(std::tuple_size_v<Header> == field_count);

// FNV-1a.
class Hash {
 public:
  Hash& add(std::int64_t number) {
    for (int shift = 0; shift < 64; shift += 8) add_byte(static_cast<unsigned char>(number >> shift));
    return *this;
  }
  Hash& add(std::string_view text) {
    for (char c : text) add_byte(static_cast<unsigned char>(c));
    return add(static_cast<std::int64_t>(text.size()));
  }
  Hash& add_layout(const Tensor& tensor) {
    add(tensor.ndim()).add(tensor.dtype().code).add(tensor.dtype().bits).add(tensor.device().device_type);
    for (int i = 0; i < tensor.ndim(); ++i) add(tensor.size(i)).add(tensor.stride(i) == 0 ? 1 : 0);
    return *this;
  }
  [[nodiscard]] std::int64_t value() const { return std::bit_cast<std::int64_t>(hash_); }

 private:
  void add_byte(unsigned char byte) { hash_ = (hash_ ^ byte) * 0x100000001B3U; }
  std::uint64_t hash_ = 0xCBF29CE484222325U;
};

std::int64_t hash_of_mask(const tvm::ffi::Optional<Tensor>& mask, const MaskDescription& description) {
  if (!mask.has_value()) return 0;
  Hash hash;
  hash.add_layout(mask.value()).add(static_cast<std::int64_t>(description.kind));
  for (std::int64_t length : description.kv_lengths) hash.add(length);
  return hash.value();
}

void add_option(Hash& hash, const tvm::ffi::Any& value) {
  const auto tensor = value.as<Tensor>();
  if (!tensor || !tensor->defined() || tensor->ndim() != 1 || tensor->device().device_type != kDLCPU) {
    hash.add(option_text(value));
    return;
  }
  hash.add_layout(*tensor);
  if (tensor->dtype() != kInt32) return;
  for (std::int64_t i = 0; i < tensor->size(0); ++i) {
    hash.add(static_cast<std::int64_t>(load_element(data_pointer(*tensor), i * tensor->stride(0), kInt32)));
  }
}

std::int64_t hash_of_key_options(const AttentionMetadataFields& fields) {
  Hash hash;
  hash.add(fields.full_attn_spans ? 1 : 0);
  for (const auto& spans : fields.full_attn_spans.value_or(std::vector<std::vector<Span>>())) {
    hash.add(static_cast<std::int64_t>(spans.size()));
    for (const Span& span : spans) hash.add(span.begin).add(span.end);
  }
  for (const QueryRange& range : fields.query_ranges) {
    hash.add(range.local_start).add(range.local_end).add(range.global_start);
  }
  for (const char* name : {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "kv_cache_dtype"}) {
    const auto value = fields.extra.Get(tvm::ffi::String(name));
    hash.add(value ? 1 : 0);
    if (value) add_option(hash, *value);
  }
  return hash.value();
}

std::int64_t tokens_of(const tvm::ffi::Optional<Tensor>& tensor) {
  return tensor.has_value() && tensor.value().ndim() == 4 ? tensor.value().size(1) : 0;
}

void describe_metadata(const AttentionMetadataObj& metadata, Header& header) {
  const AttentionMetadataFields& fields = metadata.fields;
  header[joint_rows] = tokens_of(fields.joint_query);
  header[joint_keys] = tokens_of(fields.joint_key);
  Hash joint;
  joint.add(fields.joint_strategy);
  for (const auto* tensor : {&fields.joint_query, &fields.joint_key, &fields.joint_value}) {
    joint.add(tensor->has_value() ? 1 : 0);
    if (tensor->has_value()) joint.add_layout(tensor->value());
  }
  header[joint_hash] = joint.value();
  header[mask_hash] = hash_of_mask(fields.attn_mask, metadata.mask_description());
  header[joint_mask_hash] = hash_of_mask(fields.joint_attn_mask, metadata.joint_mask_description());
  header[key_options_hash] = hash_of_key_options(fields);
  const auto valid = fields.extra.Get(tvm::ffi::String("valid_kv_length"));
  if (valid && *valid != nullptr) header[valid_keys] = valid->as<std::int64_t>().value_or(-2);
}

void check_device(const Communicator& communicator, const AttentionImpl& layer, const Tensor& query) {
  if (communicator.takes(query.device())) return;
  throw NotImplementedError(fmt::format(
      "{} got tensors on {}, which these ranks' communicator does not take. One for GPUs: nccl_communicator.",
      layer.backend().get_name(), device_name(query.device())));
}

std::int64_t multiprocessors_of(const Communicator& communicator, DLDevice device) {
  if (device.device_type != kDLCUDA || !communicator.moves_beside_compute(device)) return 0;
  return cuda_info().devices.at(static_cast<std::size_t>(device.device_id)).multiprocessors;
}

// Checks what this rank can check alone.
Header describe(const Communicator& communicator, const AttentionImpl& layer, const Tensor& query, const Tensor& key,
                const Tensor& value, const AttentionMetadata& metadata, const ForwardOutputs& outputs) {
  Problem problem = check_call(layer, query, key, value, {});
  check_device(communicator, layer, query);
  Header header{};
  header[rows] = query.size(1);
  header[keys] = key.size(1);
  header[multiprocessors] = multiprocessors_of(communicator, query.device());
  header[batch] = query.size(0);
  header[heads] = query.size(2);
  header[kv_heads] = key.size(2);
  header[head_size] = query.size(3);
  header[dtype] = query.dtype().code * 256 + query.dtype().bits;
  header[valid_keys] = -1;
  header[lse_wanted] = outputs.lse.defined() ? 1 : 0;
  header[layer_hash] = Hash()
                           .add(layer.backend().get_name())
                           .add(std::bit_cast<std::int64_t>(layer.softmax_scale()))
                           .add(layer.config().causal ? 1 : 0)
                           .value();
  static const AttentionMetadata none{AttentionMetadataFields{}};
  describe_metadata(*(metadata.defined() ? metadata : none).operator->(), header);
  problem.seq_q += header[joint_rows];
  check_outputs(outputs, problem, query, key, value, metadata);
  return header;
}

std::vector<Header> gather_headers(Communicator& communicator, const Header& mine) {
  std::vector<Header> all(static_cast<std::size_t>(communicator.size()));
  communicator.all_gather(mine.data(), all.data(), std::vector<std::int64_t>(all.size(), sizeof(mine)))->wait();
  return all;
}

// The errors of all ranks, one after the other, their bytes in `bytes`; this one's is `text`.
std::string gather_texts(Communicator& communicator, const std::vector<Header>& all, const std::string& text,
                         std::vector<std::int64_t>& bytes) {
  for (const Header& header : all) bytes.push_back(header[text_bytes]);
  std::string texts(static_cast<std::size_t>(std::reduce(bytes.begin(), bytes.end())), '\0');
  if (!texts.empty()) communicator.all_gather(text.data(), texts.data(), bytes)->wait();
  return texts;
}

// Some ranks cannot take part: they throw their own error, the others the first of those.
void refuse_together(Communicator& communicator, const std::vector<Header>& all, const std::exception_ptr& error,
                     const std::string& text) {
  std::vector<std::int64_t> bytes;
  const std::string texts = gather_texts(communicator, all, text, bytes);
  if (texts.empty()) return;
  if (error) std::rethrow_exception(error);
  std::size_t rank = 0;
  while (bytes[rank] == 0) ++rank;
  throw CommunicationError(fmt::format("Rank {} refused the call: {}", rank,
                                       std::string_view(texts).substr(0, static_cast<std::size_t>(bytes[rank]))));
}

void check_same(const std::vector<Header>& all) {
  for (std::size_t field = batch; field < field_count; ++field) {
    for (std::size_t rank = 1; rank < all.size(); ++rank) {
      if (all[rank][field] == all[0][field]) continue;
      const bool is_number = field < layer_hash;
      throw ValueError(fmt::format("Ranks 0 and {} differ in {}{}. It must be the same on all ranks.", rank,
                                   kFieldNames[field],
                                   is_number ? fmt::format(": {} and {}", all[0][field], all[rank][field]) : ""));
    }
  }
}

// A tensor of the whole's shape, to be checked and never read.
Tensor placeholder(const Tensor& like, std::int64_t tokens) {
  alignas(64) static char nothing[64];
  return wrap(nothing, {like.size(0), tokens, like.size(2), like.size(3)}, like.dtype(), {}, like.device());
}

// What all ranks' numbers come to, once they fit together.
Agreement conclude(const std::vector<Header>& all, const AttentionImpl& layer, const Tensor& query, const Tensor& key,
                   const Tensor& value, const AttentionMetadata& metadata, bool lse) {
  Agreement agreement;
  Sizes& sizes = agreement.sizes;
  for (const Header& header : all) {
    agreement.rows.push_back(header[rows]);
    agreement.keys.push_back(header[keys]);
    sizes.rows += header[rows];
    sizes.keys += header[keys];
  }
  agreement.multiprocessors =
      std::ranges::min(all, {}, [](const Header& header) { return header[multiprocessors]; })[multiprocessors];
  Problem problem = check_call(layer, placeholder(query, sizes.rows), placeholder(key, sizes.keys),
                               placeholder(value, sizes.keys), metadata);
  problem.lse = lse;
  if (const Verdict verdict = layer.backend().explain(problem); !verdict) throw ValueError(verdict.text());
  sizes.batch = all[0][batch];
  sizes.joint_rows = all[0][joint_rows];
  sizes.joint_keys = all[0][joint_keys];
  sizes.valid_keys = problem.seq_kv - sizes.joint_keys;
  sizes.joint_first = !metadata.defined() || metadata->joint_first();
  return agreement;
}

}  // namespace

const Agreement* AgreementCache::find(const CallNumbers& numbers) const {
  const auto found = std::ranges::find(entries_, numbers, &Entry::numbers);
  return found == entries_.end() ? nullptr : &found->agreement;
}

void AgreementCache::add(const CallNumbers& numbers, const Agreement& agreement) {
  if (entries_.size() == kKeptKinds) entries_.erase(entries_.begin());
  entries_.push_back({numbers, agreement});
}

Agreement agree(Communicator& communicator, AgreementCache& cache, const AttentionImpl& layer, const Tensor& query,
                const Tensor& key, const Tensor& value, const AttentionMetadata& metadata,
                const ForwardOutputs& outputs, bool needs_lse) {
  Header mine{};
  std::exception_ptr error;
  std::string text;
  try {
    mine = describe(communicator, layer, query, key, value, metadata, outputs);
  } catch (const std::exception&) {
    error = std::current_exception();
    text = error_text(error);
    mine[text_bytes] = static_cast<std::int64_t>(text.size());
  }
  const bool on_host = !query.defined() || query.device().device_type == kDLCPU;
  const bool is_captured = !on_host && cuda::is_captured(query.device());
  if (!on_host && !error) {
    if (const Agreement* before = cache.find(mine)) return *before;
  }
  if (is_captured) {  // only recorded: nobody waits, and nothing can be asked
    if (error) std::rethrow_exception(error);
    throw NotImplementedError(
        "A call over several ranks cannot be captured into a graph before the same one was made outside: in it the "
        "ranks agree. Make it once before, with the same AttentionMetadata.");
  }
  if (!on_host && error && !cache.empty()) {  // the others may not ask
    communicator.abort(text);
    std::rethrow_exception(error);
  }
  const std::vector<Header> all = gather_headers(communicator, mine);
  refuse_together(communicator, all, error, text);
  check_same(all);
  Agreement agreement = conclude(all, layer, query, key, value, metadata, outputs.lse.defined() || needs_lse);
  if (!on_host) cache.add(mine, agreement);
  return agreement;
}

void refuse(Communicator& communicator, const std::string& reason) {
  Header mine{};
  mine[text_bytes] = static_cast<std::int64_t>(reason.size());
  std::vector<std::int64_t> bytes;
  gather_texts(communicator, gather_headers(communicator, mine), reason, bytes);
}

}  // namespace ditattn::parallel
