#include "parallel/parallel_call.hpp"

#include "parallel/merge.hpp"

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

Tensor cut(const Tensor& tensor, Range batch, Range tokens, Range heads) {
  return slice(slice(slice(tensor, 0, batch), 1, tokens), 2, heads);
}

}  // namespace

ParallelCall::ParallelCall(const LayerState& layer, GroupState& group, const Agreement& agreement,
                           const AttentionMetadata& metadata)
    : layer_(layer),
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
                      .heads = layer.heads.runs,
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
  group_.workspace.use(device_);
  const KeysAndValues own = group_.mesh.ulysses > 1 ? scatter(query, key, value) : keep(query, key, value);
  if (group_.mesh.second() == 1) {
    compute_whole(own, outputs.lse.defined());
  } else {
    const Range text = plan_->rows[0].tokens;
    if (sizes.joint_rows > 0) {
      queries_[0] = slice(slice(metadata_->fields.joint_query.value(), 1, text), 2, layer_.heads.query);
    }
    rows_[0] = {.out = floats(Slot::text_out, text.size(), size_), .lse = floats(Slot::text_lse, text.size(), 1)};
    rows_[1] = {.out = floats(Slot::image_out, my_rows.size(), size_),
                .lse = floats(Slot::image_lse, my_rows.size(), 1)};
    for (const Rows& rows : rows_) clear(rows.out, rows.lse);
    group_.mesh.ring > 1 ? compute_ring(own) : compute_gathered(own);
    for (std::size_t i = 0; i < rows_.size() && dtype_ != kFloat32; ++i) {
      const Tensor rounded = like_query(i == 0 ? Slot::text_rounded : Slot::image_rounded, rows_[i].out.size(1));
      convert(rounded, rows_[i].out);
      rows_[i].out = rounded;
    }
  }
  give_back(outputs);
}

// This rank's heads of the tokens of its place.
ParallelCall::KeysAndValues ParallelCall::scatter(const Tensor& query, const Tensor& key, const Tensor& value) {
  Workspace& workspace = group_.workspace;
  const auto place = static_cast<std::size_t>(place_);
  const std::int64_t key_bytes = bytes_of(key, key_chunks_[place].size(), layer_.heads.kv.size());
  char* const queries =
      workspace.get(Slot::query, bytes_of(query, row_chunks_[place].size(), layer_.heads.query.size()));
  char* const keys = workspace.get(Slot::keys_and_values, 2 * key_bytes);
  HeadScatter batch(*group_.ulysses, workspace);
  const auto key_tokens = of_my_place(agreement_.keys);
  queries_[1] = batch.add(Slot::query_sent, queries, query, layer_.query_heads, of_my_place(agreement_.rows));
  KeysAndValues own{.key = batch.add(Slot::key_sent, keys, key, layer_.kv_heads, key_tokens),
                    .value = batch.add(Slot::value_sent, keys + key_bytes, value, layer_.kv_heads, key_tokens)};
  batch.exchange();
  return own;
}

// They have these heads and tokens already; keys are sent on, token after token.
ParallelCall::KeysAndValues ParallelCall::keep(const Tensor& query, const Tensor& key, const Tensor& value) {
  queries_[1] = query;
  if (is_token_major(key) && is_token_major(value)) return {.key = key, .value = value};
  char* const memory =
      group_.workspace.get(Slot::keys_and_values, 2 * bytes_of(key, key.size(1), layer_.heads.kv.size()));
  KeysAndValues own = keys_in(memory, key.size(1));
  copy(std::array{TokenCopy{.to = own.key, .from = key}, TokenCopy{.to = own.value, .from = value}});
  return own;
}

std::span<const std::int64_t> ParallelCall::of_my_place(const std::vector<std::int64_t>& lengths) const {
  const auto ulysses = static_cast<std::size_t>(group_.mesh.ulysses);
  return std::span(lengths).subspan(static_cast<std::size_t>(place_) * ulysses, ulysses);
}

Tensor ParallelCall::floats(Slot slot, std::int64_t tokens, std::int64_t size) const {
  const std::int64_t heads = layer_.heads.query.size();
  char* const memory = group_.workspace.get(slot, batch_ * tokens * heads * size * std::int64_t{sizeof(float)});
  return token_major(memory, batch_, tokens, heads, size, kFloat32, device_);
}

Tensor ParallelCall::like_query(Slot slot, std::int64_t tokens) const {
  const std::int64_t heads = layer_.heads.query.size();
  char* const memory = group_.workspace.get(slot, batch_ * tokens * heads * size_ * (dtype_.bits / 8));
  return token_major(memory, batch_, tokens, heads, size_, dtype_, device_);
}

ParallelCall::KeysAndValues ParallelCall::keys_in(char* memory, std::int64_t tokens) const {
  const std::int64_t heads = layer_.heads.kv.size();
  const Tensor key = token_major(memory, batch_, tokens, heads, size_, dtype_, device_);
  return {.key = key,
          .value = token_major(memory + bytes_of(key, tokens, heads), batch_, tokens, heads, size_, dtype_, device_)};
}

// Every key is here: the back end's own call, for some heads.
void ParallelCall::compute_whole(const KeysAndValues& keys, bool lse_wanted) {
  const Sizes& sizes = agreement_.sizes;
  Rows all{.out = like_query(Slot::image_out, sizes.total_rows()), .lse = {}};
  if (lse_wanted) all.lse = floats(Slot::image_lse, sizes.total_rows(), 1);
  const bool causal = layer_.whole->config().causal;
  for (std::size_t run = 0; run < layer_.heads.runs.size(); ++run) {
    const Range heads = from(layer_.heads.runs[run].query, layer_.heads.query.begin);
    const Range kv = from(layer_.heads.runs[run].kv, layer_.heads.kv.begin);
    layer_.runs[run][causal ? 1 : 0]->forward(
        slice(queries_[1], 2, heads), slice(keys.key, 2, kv), slice(keys.value, 2, kv), plan_->whole[run],
        {.out = slice(all.out, 2, heads), .lse = lse_wanted ? tokens_as_lse(slice(all.lse, 2, heads)) : Tensor()});
  }
  const std::array segments = {Segment{.joint = true, .tokens = {0, sizes.joint_rows}},
                               Segment{.joint = false, .tokens = {0, sizes.rows}}};
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const Range rows = joined_rows(sizes, segments[i]);
    rows_[i] = {.out = slice(all.out, 1, rows), .lse = lse_wanted ? slice(all.lse, 1, rows) : Tensor()};
  }
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
      next = keys_in(group_.workspace.get(slot, 2 * bytes_of(own.key, tokens, layer_.heads.kv.size())), tokens);
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
      group_.workspace.get(Slot::next_keys_and_values, 2 * bytes_of(own.key, tokens, layer_.heads.kv.size()));
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
  compute_keys(0, {.key = slice(fields.joint_key.value(), 2, layer_.heads.kv),
                   .value = slice(fields.joint_value.value(), 2, layer_.heads.kv)});
}

void ParallelCall::compute_keys(std::size_t segment, const KeysAndValues& keys) {
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    for (const PlannedCall& planned : plan_->calls[segment][i]) compute_part(planned, queries_[i], keys, rows_[i]);
  }
}

void ParallelCall::compute_part(const PlannedCall& planned, const Tensor& query, const KeysAndValues& keys,
                                const Rows& into) {
  const BlockCall& block = planned.block;
  const Range heads = from(layer_.heads.runs[planned.run].query, layer_.heads.query.begin);
  const Range kv = from(layer_.heads.runs[planned.run].kv, layer_.heads.kv.begin);
  const std::int64_t numbers = block.batch.size() * block.rows.size() * heads.size();
  const auto part = [&](Slot slot, std::int64_t size, DLDataType dtype) {
    char* const memory = group_.workspace.get(slot, numbers * size * (dtype.bits / 8));
    return token_major(memory, block.batch.size(), block.rows.size(), heads.size(), size, dtype, device_);
  };
  const Rows result{.out = part(Slot::part_out, size_, dtype_), .lse = part(Slot::part_lse, 1, kFloat32)};
  layer_.runs[planned.run][block.causal ? 1 : 0]->forward(
      cut(query, block.batch, block.rows, heads), cut(keys.key, block.batch, block.keys, kv),
      cut(keys.value, block.batch, block.keys, kv), planned.metadata,
      {.out = result.out, .lse = tokens_as_lse(result.lse)});
  merge(cut(into.out, block.batch, block.rows, heads), cut(into.lse, block.batch, block.rows, heads), result.out,
        result.lse);
}

// The image's rows go to the ranks they came from, the text's to all.
void ParallelCall::give_back(const ForwardOutputs& outputs) {
  const Sizes& sizes = agreement_.sizes;
  const auto places = static_cast<std::int64_t>(row_chunks_.size());
  const int ulysses = group_.mesh.ulysses;
  std::vector<Range> text_rows;
  std::vector<Range> text_heads;
  for (int rank = 0; rank < group_.all->size(); ++rank) {
    text_rows.push_back(share(sizes.joint_rows, places, rank / ulysses));
    text_heads.push_back(layer_.query_heads[static_cast<std::size_t>(rank % ulysses)]);
  }
  const std::int64_t my_rows = agreement_.rows[static_cast<std::size_t>(group_.all->rank())];
  const Range image = sizes.joint_first ? Range{sizes.joint_rows, sizes.joint_rows + my_rows} : Range{0, my_rows};
  const Range text = sizes.joint_first ? Range{0, sizes.joint_rows} : Range{my_rows, my_rows + sizes.joint_rows};
  const auto give = [&](const Tensor& to, Tensor Rows::*member) {
    gather_heads(*group_.ulysses, group_.workspace, rows_[1].*member, slice(to, 1, image), layer_.query_heads,
                 of_my_place(agreement_.rows));
    if (sizes.joint_rows == 0) return;
    gather_parts(*group_.all, group_.workspace, rows_[0].*member, slice(to, 1, text), text_rows, text_heads);
  };
  give(outputs.out, &Rows::out);
  if (outputs.lse.defined()) give(lse_as_tokens(outputs.lse), &Rows::lse);
}

}  // namespace ditattn::parallel
