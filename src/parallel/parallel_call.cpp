#include "parallel/parallel_call.hpp"

#include "ditattn/registry.hpp"
#include "parallel/merge.hpp"
#include "registry/table_backend.hpp"

namespace ditattn::parallel {
namespace {

Range from(Range range, std::int64_t origin) { return {range.begin - origin, range.end - origin}; }

// Tokens of the ranks of each place on the second axis.
std::vector<Range> chunks(const std::vector<std::int64_t>& lengths, int ranks_each) {
  std::vector<Range> result;
  std::int64_t at = 0;
  for (std::size_t rank = 0; rank < lengths.size(); ++rank) {
    if (rank % static_cast<std::size_t>(ranks_each) == 0) result.push_back({at, at});
    at += lengths[rank];
    result.back().end = at;
  }
  return result;
}

// Ranks agree without looking at alignment, of which engines on GPUs demand 16 bytes.
bool lies_well(const Tensor& tensor) {
  return tensor.device().device_type == kDLCPU || tensor.numel() == 0 || alignment_of(tensor) == 16;
}

Tensor cut(const Tensor& tensor, Range batch, Range tokens, Range heads) {
  return slice(slice(slice(tensor, 0, batch), 1, tokens), 2, heads);
}

}  // namespace

ParallelCall::ParallelCall(LayerState& layer, GroupState& group, const Agreement& agreement,
                           const AttentionMetadata& metadata)
    : layer_(layer),
      heads_(layer.heads()),
      group_(group),
      agreement_(agreement),
      metadata_(metadata),
      place_(group.second->rank()),
      row_chunks_(chunks(agreement.rows, group.mesh.ulysses)),
      key_chunks_(chunks(agreement.keys, group.mesh.ulysses)) {
  PlanRequest request{.metadata = metadata,
                      .sizes = agreement.sizes,
                      .row_chunks = row_chunks_,
                      .key_chunks = key_chunks_,
                      .place = place_,
                      .heads = heads_.mine.runs,
                      .causal = layer.whole->config().causal,
                      .alignment = layer.whole->backend().capabilities().causal_alignment};
  if (group.mesh.allgather > 1) request.key_chunks = {{0, agreement.sizes.keys}};
  plan_ = group.plans.get(request);
}

void ParallelCall::run(const Tensor& query, const Tensor& key, const Tensor& value, const ForwardOutputs& outputs) {
  batch_ = query.size(0);
  size_ = query.size(3);
  dtype_ = query.dtype();
  device_ = query.device();
  const Sizes& sizes = agreement_.sizes;
  const Range my_rows = row_chunks_[static_cast<std::size_t>(place_)];
  group_.workspace.use(device_, *group_.all);
  const KeysAndValues own = group_.mesh.ulysses > 1 ? scatter(query, key, value) : keep(query, key, value);
  const Range text = plan_->rows[0].tokens;
  if (sizes.joint_rows > 0) {
    queries_[0] = slice(slice(metadata_->fields.joint_query.value(), 1, text), 2, heads_.mine.query);
  }
  prepare(0, like_query(Slot::text_rounded, text.size()), Slot::text_lse);
  const Tensor mine = slice(outputs.out, 1, image_rows(sizes, outputs.out.size(1)));
  const bool in_place = group_.mesh.ulysses == 1 && lies_well(mine);
  prepare(1, in_place ? mine : like_query(Slot::image_rounded, my_rows.size()), Slot::image_lse);
  group_.mesh.ring > 1 ? compute_ring(own) : compute_gathered(own);
  for (const Rows& rows : rows_) finish(rows);
  give_back(outputs);
}

// This rank's heads of the tokens of its place.
ParallelCall::KeysAndValues ParallelCall::scatter(const Tensor& query, const Tensor& key, const Tensor& value) {
  const std::vector<Range> query_heads = heads_.query_heads(0);
  const std::vector<Range> kv_heads = heads_.kv_heads(0);
  const auto key_tokens = of_my_place(agreement_.keys);
  HeadScatter batch(*group_.ulysses, group_.workspace, 0);
  queries_[1] = batch.add(Slot::query_sent, Slot::query, query, query_heads, of_my_place(agreement_.rows));
  KeysAndValues own{.key = batch.add(Slot::key_sent, Slot::key, key, kv_heads, key_tokens),
                    .value = batch.add(Slot::value_sent, Slot::value, value, kv_heads, key_tokens)};
  batch.start(Meanwhile::nothing)->wait();
  return own;
}

// They have these heads and tokens already; keys are sent on, token after token.
ParallelCall::KeysAndValues ParallelCall::keep(const Tensor& query, const Tensor& key, const Tensor& value) {
  queries_[1] = query;
  if (!lies_well(query)) {
    char* const memory = group_.workspace.get(Slot::query, bytes_of(query, query.size(1), query.size(2)));
    queries_[1] = token_major(memory, batch_, query.size(1), query.size(2), size_, dtype_, device_);
    copy(queries_[1], query);
  }
  if (is_token_major(key) && is_token_major(value) && lies_well(key) && lies_well(value)) {
    return {.key = key, .value = value};
  }
  char* const memory =
      group_.workspace.get(Slot::keys_and_values, 2 * bytes_of(key, key.size(1), heads_.mine.kv.size()));
  KeysAndValues own = keys_in(memory, key.size(1));
  copy(std::array{TokenCopy{.to = own.key, .from = key}, TokenCopy{.to = own.value, .from = value}});
  return own;
}

std::span<const std::int64_t> ParallelCall::of_my_place(const std::vector<std::int64_t>& lengths) const {
  const auto ulysses = static_cast<std::size_t>(group_.mesh.ulysses);
  return std::span(lengths).subspan(static_cast<std::size_t>(place_) * ulysses, ulysses);
}

Tensor ParallelCall::floats(Slot slot, std::int64_t tokens, std::int64_t size) const {
  const std::int64_t heads = heads_.mine.query.size();
  char* const memory = group_.workspace.get(slot, batch_ * tokens * heads * size * std::int64_t{sizeof(float)});
  return token_major(memory, batch_, tokens, heads, size, kFloat32, device_);
}

Tensor ParallelCall::like_query(Slot slot, std::int64_t tokens) const {
  const std::int64_t heads = heads_.mine.query.size();
  char* const memory = group_.workspace.get(slot, batch_ * tokens * heads * size_ * (dtype_.bits / 8));
  return token_major(memory, batch_, tokens, heads, size_, dtype_, device_);
}

ParallelCall::KeysAndValues ParallelCall::keys_in(char* memory, std::int64_t tokens) const {
  const std::int64_t heads = heads_.mine.kv.size();
  const Tensor key = token_major(memory, batch_, tokens, heads, size_, dtype_, device_);
  return {.key = key,
          .value = token_major(memory + bytes_of(key, tokens, heads), batch_, tokens, heads, size_, dtype_, device_)};
}

// Each step computes with one chunk of keys while the next is on its way. Results are merged in the order of the steps:
// the text's keys, this place's, then those of the places before it, one after the other.
void ParallelCall::compute_ring(const KeysAndValues& own) {
  const int places = group_.second->size();
  const auto chunk_at = [&](int step) { return static_cast<std::size_t>((place_ - step + places) % places); };
  KeysAndValues keys = own;
  for (int step = 0; step < places; ++step) {
    std::unique_ptr<Pending> pending;
    KeysAndValues next;
    if (step + 1 < places) {
      const Slot slot = step % 2 == 0 ? Slot::next_keys_and_values : Slot::last_keys_and_values;
      const std::int64_t tokens = key_chunks_[chunk_at(step + 1)].size();
      next = keys_in(group_.workspace.get(slot, 2 * bytes_of(own.key, tokens, heads_.mine.kv.size())), tokens);
      pending = pass_on(*group_.second, std::array{keys.key, keys.value}, std::array{next.key, next.value});
    }
    if (step == 0) compute_text_keys();
    compute_keys(1 + chunk_at(step), keys);
    if (pending) pending->wait();
    keys = next;
  }
}

// The text's keys while the image's are gathered, then all of these at once.
void ParallelCall::compute_gathered(const KeysAndValues& own) {
  const std::int64_t tokens = agreement_.sizes.keys;
  char* const memory =
      group_.workspace.get(Slot::next_keys_and_values, 2 * bytes_of(own.key, tokens, heads_.mine.kv.size()));
  const KeysAndValues all = keys_in(memory, tokens);
  const auto pending = gather_tokens(
      *group_.second,
      std::array{TokenCopy{.to = all.key, .from = own.key}, TokenCopy{.to = all.value, .from = own.value}},
      key_chunks_);
  compute_text_keys();
  pending->wait();
  compute_keys(1, all);
}

void ParallelCall::compute_text_keys() {
  if (agreement_.sizes.joint_keys == 0) return;
  const AttentionMetadataFields& fields = metadata_->fields;
  compute_keys(0, {.key = slice(fields.joint_key.value(), 2, heads_.mine.kv),
                   .value = slice(fields.joint_value.value(), 2, heads_.mine.kv)});
}

void ParallelCall::compute_keys(std::size_t segment, const KeysAndValues& keys) {
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    for (const PlannedCall& planned : plan_->calls[segment][i]) compute_part(planned, queries_[i], keys, rows_[i]);
  }
}

// Where the results of a segment's rows go. Parts that have all rows and heads need no sums before the second.
void ParallelCall::prepare(std::size_t segment, const Tensor& out, Slot lse) {
  Rows& rows = rows_[segment];
  rows.result = {.out = out, .lse = floats(lse, out.size(1), 1)};
  for (const auto& calls : plan_->calls) {
    for (const PlannedCall& planned : calls[segment]) {
      const BlockCall& block = planned.block;
      rows.parts_are_whole = rows.parts_are_whole && heads_.mine.runs.size() == 1 && block.batch == Range{0, batch_} &&
                             block.rows == Range{0, out.size(1)};
      ++rows.parts;
    }
  }
  rows.parts_are_whole = rows.parts_are_whole && rows.parts > 0;
  if (!rows.parts_are_whole || rows.parts > 2) {
    rows.sums = floats(segment == 0 ? Slot::text_out : Slot::image_out, out.size(1), size_);
  }
  if (!rows.parts_are_whole) {
    clear({.out = rows.sums, .lse = rows.result.lse});
  } else if (rows.parts > 1) {
    rows.first = like_query(segment == 0 ? Slot::text_first : Slot::image_first, out.size(1));
  }
}

void ParallelCall::compute_part(const PlannedCall& planned, const Tensor& query, const KeysAndValues& keys,
                                Rows& rows) {
  const BlockCall& block = planned.block;
  const Range heads = from(heads_.mine.runs[planned.run].query, heads_.mine.query.begin);
  const bool is_first = rows.merged++ == 0;
  const bool is_last = rows.merged == rows.parts;
  if (rows.parts_are_whole && is_first) {
    return compute(planned, query, keys, {.out = is_last ? rows.result.out : rows.first, .lse = rows.result.lse});
  }
  const std::int64_t numbers = block.batch.size() * block.rows.size() * heads.size();
  const auto memory = [&](Slot slot, std::int64_t size, DLDataType dtype) {
    char* const data = group_.workspace.get(slot, numbers * size * (dtype.bits / 8));
    return token_major(data, block.batch.size(), block.rows.size(), heads.size(), size, dtype, device_);
  };
  const Part part{.out = memory(Slot::part_out, size_, dtype_), .lse = memory(Slot::part_lse, 1, kFloat32)};
  compute(planned, query, keys, part);
  if (rows.parts_are_whole) {
    const Tensor& before = rows.merged == 2 ? rows.first : rows.sums;
    const Tensor& after = is_last ? rows.result.out : rows.sums;
    merge({.out = after, .lse = rows.result.lse}, {.out = before, .lse = rows.result.lse}, part);
  } else {
    const Part sums{.out = cut(rows.sums, block.batch, block.rows, heads),
                    .lse = cut(rows.result.lse, block.batch, block.rows, heads)};
    merge(sums, sums, part);
  }
}

void ParallelCall::compute(const PlannedCall& planned, const Tensor& query, const KeysAndValues& keys,
                           const Part& into) {
  const BlockCall& block = planned.block;
  const Range heads = from(heads_.mine.runs[planned.run].query, heads_.mine.query.begin);
  const Range kv = from(heads_.mine.runs[planned.run].kv, heads_.mine.kv.begin);
  impl_for(planned).forward(cut(query, block.batch, block.rows, heads), cut(keys.key, block.batch, block.keys, kv),
                            cut(keys.value, block.batch, block.keys, kv), planned.metadata,
                            {.out = into.out, .lse = tokens_as_lse(into.lse)});
}

void ParallelCall::finish(const Rows& rows) {
  if (!rows.parts_are_whole) convert(rows.result.out, rows.sums);
}

// A ring's parts may be single keys, which cuDNN refuses: TORCH_SDPA computes these then.
const AttentionImpl& ParallelCall::impl_for(const PlannedCall& planned) {
  if (planned.block.keys.size() == 1 && !layer_.asked_of_one_key) {
    const auto& own = layer_.whole->backend();
    const Problem one_key{.seq_kv = 1, .head_size = size_, .dtype = dtype_, .device = device_, .lse = true};
    for (const auto& run : heads_.runs) {
      if (own.explain(one_key)) break;
      ImplConfig config = run[0]->config();
      config.backend_kwargs = {};  // the other's
      layer_.of_one_key.push_back(BackendAccess::create(DiffusionAttentionBackendEnum::TORCH_SDPA.get_class(), config));
    }
    layer_.asked_of_one_key = true;
  }
  if (planned.block.keys.size() == 1 && !layer_.of_one_key.empty()) return *layer_.of_one_key[planned.run];
  return *heads_.runs[planned.run][planned.block.causal ? 1 : 0];
}

// The image's rows go to the ranks they came from, the text's to all.
void ParallelCall::give_back(const ForwardOutputs& outputs) {
  const Sizes& sizes = agreement_.sizes;
  const auto places = static_cast<std::int64_t>(row_chunks_.size());
  const int ulysses = group_.mesh.ulysses;
  const std::vector<Range> heads = heads_.query_heads(0);
  std::vector<Range> text_shares;
  std::vector<Range> text_heads;
  for (int rank = 0; rank < group_.all->size(); ++rank) {
    text_shares.push_back(share(sizes.joint_rows, places, rank / ulysses));
    text_heads.push_back(heads[static_cast<std::size_t>(rank % ulysses)]);
  }
  HeadGather image(*group_.ulysses, group_.workspace, 0);
  HeadGather text(*group_.all, group_.workspace, 0);
  const auto add = [&](const Tensor& to, Tensor Part::*member, Slot received, Slot received_text) {
    image.add_rows(received, rows_[1].result.*member, slice(to, 1, image_rows(sizes, to.size(1))), heads,
                   of_my_place(agreement_.rows));
    if (sizes.joint_rows == 0) return;
    text.add_shared(received_text, rows_[0].result.*member, slice(to, 1, text_rows(sizes, to.size(1))), text_shares,
                    text_heads);
  };
  add(outputs.out, &Part::out, Slot::received, Slot::received_text);
  if (outputs.lse.defined()) {
    add(lse_as_tokens(outputs.lse), &Part::lse, Slot::received_lse, Slot::received_text_lse);
  }
  image.start(Operation::all_to_all, Meanwhile::nothing, {});
  image.finish();
  text.start(Operation::all_gather, Meanwhile::nothing, {});
  text.finish();
}

}  // namespace ditattn::parallel
