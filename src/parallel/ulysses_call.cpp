#include "parallel/ulysses_call.hpp"

#include <algorithm>

namespace ditattn::parallel {
namespace {

Range from(Range range, std::int64_t origin) { return {range.begin - origin, range.end - origin}; }

bool has(Range range, std::int64_t index) { return range.begin <= index && index < range.end; }

}  // namespace

UlyssesCall::UlyssesCall(const LayerState& layer, const CutHeads& heads, GroupState& group, const Agreement& agreement,
                         const AttentionMetadata& metadata)
    : layer_(layer), heads_(heads), group_(group), agreement_(agreement) {
  plan_ = group.plans.get({.metadata = metadata,
                           .sizes = agreement.sizes,
                           .row_chunks = {{0, agreement.sizes.rows}},
                           .key_chunks = {{0, agreement.sizes.keys}},
                           .heads = heads.mine.runs,
                           .causal = layer.whole->config().causal});
}

void UlyssesCall::run(const Tensor& query, const Tensor& key, const Tensor& value, const ForwardOutputs& outputs) {
  group_.workspace.use(query.device(), *group_.all);
  const auto parts = static_cast<int>(heads_.mine.parts.size());
  std::vector<Input> inputs;
  std::vector<HeadScatter> batches;
  inputs.reserve(heads_.mine.parts.size());
  batches.reserve(heads_.mine.parts.size());
  for (int part = 0; part < parts; ++part) {
    batches.emplace_back(*group_.ulysses, group_.workspace, part, part > 0 ? &batches.front() : nullptr);
    inputs.push_back(add(part, batches.back(), query, key, value));
  }
  for (int part = 0; part < parts; ++part) {
    inputs[static_cast<std::size_t>(part)].pending =
        batches[static_cast<std::size_t>(part)].start(part == 0 ? Meanwhile::nothing : Meanwhile::compute);
  }
  std::vector<HeadGather> before;
  before.reserve(heads_.mine.parts.size());
  for (int part = 0; part < parts; ++part) {
    inputs[static_cast<std::size_t>(part)].pending->wait();
    HeadGather result = gather(part, compute(part, inputs, outputs.lse.defined()), outputs);
    if (part + 1 < parts) {
      result.start_first(Operation::all_to_all);
      before.push_back(std::move(result));
    } else {
      result.start(Operation::all_to_all, Meanwhile::nothing, before);
      result.finish();
    }
  }
}

UlyssesCall::Input UlyssesCall::add(int part, HeadScatter& batch, const Tensor& query, const Tensor& key,
                                    const Tensor& value) {
  const std::vector<Range> query_heads = heads_.query_heads(part);
  const std::vector<Range> kv_heads = heads_.kv_heads(part);
  return {.query = batch.add(Slot::query_sent, Slot::query, query, query_heads, agreement_.rows),
          .key = batch.add(Slot::key_sent, Slot::key, key, kv_heads, agreement_.keys),
          .value = batch.add(Slot::value_sent, Slot::value, value, kv_heads, agreement_.keys),
          .pending = nullptr};
}

// The back end's own call for each run of heads. All K/V heads of a run came together: one that an earlier part needed
// too is a run of its own.
Part UlyssesCall::compute(int part, const std::vector<Input>& inputs, bool lse_wanted) {
  const Range mine = heads_.mine.parts[static_cast<std::size_t>(part)].query;
  const Tensor& query = inputs[static_cast<std::size_t>(part)].query;
  const auto make = [&](Slot slot, std::int64_t size, DLDataType dtype) {
    const std::int64_t rows = agreement_.sizes.total_rows();
    char* const memory = group_.workspace.get(slot, query.size(0) * rows * mine.size() * size * (dtype.bits / 8), part);
    return token_major(memory, query.size(0), rows, mine.size(), size, dtype, query.device());
  };
  Part result{.out = make(Slot::image_rounded, query.size(3), query.dtype()),
              .lse = lse_wanted ? make(Slot::image_lse, 1, kFloat32) : Tensor()};
  for (std::size_t i = 0; i < heads_.mine.runs.size(); ++i) {
    const HeadRun& run = heads_.mine.runs[i];
    if (!has(mine, run.query.begin)) continue;
    const auto came =
        std::ranges::find_if(heads_.mine.parts, [&](const HeadPart& with) { return has(with.kv, run.kv.begin); });
    const Input& keys = inputs[static_cast<std::size_t>(came - heads_.mine.parts.begin())];
    const Range heads = from(run.query, mine.begin);
    const Range kv = from(run.kv, came->kv.begin);
    heads_.runs[i][layer_.whole->config().causal ? 1 : 0]->forward(
        slice(query, 2, heads), slice(keys.key, 2, kv), slice(keys.value, 2, kv), plan_->whole[i],
        {.out = slice(result.out, 2, heads),
         .lse = lse_wanted ? tokens_as_lse(slice(result.lse, 2, heads)) : Tensor()});
  }
  return result;
}

// The image's rows go to the ranks they came from, the text's to all.
HeadGather UlyssesCall::gather(int part, const Part& result, const ForwardOutputs& outputs) {
  const Sizes& sizes = agreement_.sizes;
  const std::vector<Range> heads = heads_.query_heads(part);
  const std::vector<Range> all_text(heads.size(), {0, sizes.joint_rows});
  HeadGather batch(*group_.ulysses, group_.workspace, part);
  const auto add = [&](const Tensor& mine, const Tensor& to, Slot received, Slot received_text) {
    batch.add_rows(received, slice(mine, 1, image_rows(sizes, mine.size(1))),
                   slice(to, 1, image_rows(sizes, to.size(1))), heads, agreement_.rows);
    if (sizes.joint_rows == 0) return;
    batch.add_shared(received_text, slice(mine, 1, text_rows(sizes, mine.size(1))),
                     slice(to, 1, text_rows(sizes, to.size(1))), all_text, heads);
  };
  add(result.out, outputs.out, Slot::received, Slot::received_text);
  if (outputs.lse.defined()) {
    add(result.lse, lse_as_tokens(outputs.lse), Slot::received_lse, Slot::received_text_lse);
  }
  return batch;
}

}  // namespace ditattn::parallel
