#include "tests/parallel/ranks.hpp"

#include <fmt/format.h>

#include <cstring>
#include <map>
#include <numeric>

#include "parallel/group.hpp"

namespace ditattn::parallel::testing {
namespace {

std::int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * (tensor.dtype().bits / 8); }

Range part(const std::vector<std::int64_t>& lengths, int rank) {
  const auto begin = std::accumulate(lengths.begin(), lengths.begin() + rank, std::int64_t{0});
  return {begin, begin + lengths[static_cast<std::size_t>(rank)]};
}

std::int64_t joint_rows(const AttentionMetadata& metadata) {
  return metadata.defined() && metadata->has_joint() ? metadata->fields.joint_query.value().size(1) : 0;
}

// A mesh of two dimensions splits its ranks, which takes NCCL the better part of a second each time. So there a process
// keeps one for all problems, whose calls of other shapes, dtypes and back ends meet in its memory.
std::shared_ptr<ParallelGroup> group_of(const std::shared_ptr<Communicator>& communicator, const Mesh& mesh) {
  static auto& kept = *new std::map<std::string, std::shared_ptr<ParallelGroup>>;  // ends with the process
  const bool is_split = mesh.ulysses > 1 && mesh.second() > 1;
  if (!ranks().are_over_nccl || !is_split) return std::make_shared<ParallelGroup>(communicator, mesh);
  std::shared_ptr<ParallelGroup>& group = kept[mesh_name(mesh)];
  if (!group) group = std::make_shared<ParallelGroup>(communicator, mesh);
  return group;
}

bool joint_first(const AttentionMetadata& metadata) { return !metadata.defined() || metadata->joint_first(); }

// Every rank's (B, its rows + text, heads, size) becomes the whole's (B, text and rows, heads, size).
Tensor assemble(Communicator& communicator, const Tensor& mine, const std::vector<std::int64_t>& rows,
                std::int64_t text, bool text_first, std::string& wrong) {
  std::vector<std::int64_t> bytes;
  const std::int64_t row_bytes = mine.size(0) * mine.size(2) * mine.size(3) * (mine.dtype().bits / 8);
  for (std::int64_t length : rows) bytes.push_back((length + text) * row_bytes);
  std::vector<char> all(static_cast<std::size_t>(std::accumulate(bytes.begin(), bytes.end(), std::int64_t{1})));
  communicator.all_gather(data_pointer(mine), all.data(), bytes)->wait();
  const std::int64_t total = std::accumulate(rows.begin(), rows.end(), text);
  const Tensor whole = empty({mine.size(0), total, mine.size(2), mine.size(3)}, mine.dtype());
  Tensor first_text;
  std::int64_t at = 0;
  for (int rank = 0; rank < communicator.size(); ++rank) {
    const std::int64_t length = rows[static_cast<std::size_t>(rank)];
    const Tensor part = wrap(all.data() + at, {mine.size(0), length + text, mine.size(2), mine.size(3)}, mine.dtype());
    at += bytes[static_cast<std::size_t>(rank)];
    const Range image = text_first ? Range{text, text + length} : Range{0, length};
    const Range texts = text_first ? Range{0, text} : Range{length, length + text};
    const Range place = testing::part(rows, rank);
    const std::int64_t before = text_first ? text : 0;
    copy(slice(whole, 1, {place.begin + before, place.end + before}), slice(part, 1, image));
    const Tensor to = slice(whole, 1, text_first ? Range{0, text} : Range{total - text, total});
    if (rank == 0) {
      copy(to, slice(part, 1, texts));
      first_text = empty({mine.size(0), text, mine.size(2), mine.size(3)}, mine.dtype());
      copy(first_text, to);
    } else {
      const Tensor other = empty({mine.size(0), text, mine.size(2), mine.size(3)}, mine.dtype());
      copy(other, slice(part, 1, texts));
      if (!same_bits(first_text, other)) wrong = fmt::format("text rows differ between ranks 0 and {}", rank);
    }
  }
  return whole;
}

}  // namespace

Ranks& ranks() {
  static Ranks instance;
  return instance;
}

Tensor on(DLDevice device, const Tensor& tensor) {
  return tensor.device().device_type == device.device_type ? tensor : copy_to(tensor, device);
}

AttentionMetadata on(DLDevice device, const AttentionMetadata& metadata) {
  return device.device_type == kDLCPU ? metadata : copy_to(metadata, device);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return bytes_of(a) == bytes_of(b) &&
         std::memcmp(data_pointer(a), data_pointer(b), static_cast<std::size_t>(bytes_of(a))) == 0;
}

Whole compute(const conformance::Drawn& problem, const BackendClass& backend, const Mesh& mesh,
              const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& keys, int repeats, Cut cut) {
  Whole whole;
  ranks().run(mesh.ulysses * mesh.second(), [&](const std::shared_ptr<Communicator>& communicator) {
    const auto group = group_of(communicator, mesh);
    GroupAccess::state(*group).cut = cut;
    ParallelAttention layer(backend, problem.config, group);
    const int rank = communicator->rank();
    const DLDevice device = ranks().device(rank);
    const Tensor query = on(device, slice(problem.query, 1, part(rows, rank)));
    const Tensor key = on(device, slice(problem.key, 1, part(keys, rank)));
    const Tensor value = on(device, slice(problem.value, 1, part(keys, rank)));
    const AttentionMetadata metadata = on(device, problem.metadata);
    const std::int64_t text = joint_rows(problem.metadata);
    Tensor lse = empty(std::array{query.size(0), query.size(2), query.size(1) + text}, kFloat32, device);
    Tensor out;
    for (int i = 0; i < repeats; ++i) out = layer.forward(query, key, value, metadata, {.lse = lse});
    out = on(kCpu, out);
    lse = on(kCpu, lse);
    communicator->throw_if_failed();
    // An LSE by token, as the whole is put together.
    const Tensor sums = empty({lse.size(0), lse.size(2), lse.size(1), 1}, kFloat32);
    copy(sums, lse_as_tokens(lse));
    std::string wrong;
    const bool first = joint_first(problem.metadata);
    const Tensor whole_out = assemble(*communicator, out, rows, text, first, wrong);
    const Tensor whole_sums = assemble(*communicator, sums, rows, text, first, wrong);
    if (rank != 0) return;
    whole.out = whole_out;
    whole.lse = empty({whole_sums.size(0), whole_sums.size(2), whole_sums.size(1)}, kFloat32);
    copy(lse_as_tokens(whole.lse), whole_sums);
    whole.wrong = wrong;
  });
  return whole;
}

}  // namespace ditattn::parallel::testing
