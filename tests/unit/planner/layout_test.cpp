// The planner's sizes against what ParallelAttention really sends and keeps, over ranks that are threads: bytes counted
// in the transport, memory by the workspace itself. DITATTN_TEST_SEED chooses other problems.

#include "planner/layout.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>

#include "parallel/group.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn::parallel {
namespace {

// An explicit instantiation may name private members: the way to a workspace's memory, which nobody else needs.
using Slots = std::array<Tensor, static_cast<std::size_t>(Slot::count) * kMostParts>;
template <auto Member>
struct ReachSlots {
  friend Slots& slots_of(Workspace& workspace) { return workspace.*Member; }
};
Slots& slots_of(Workspace& workspace);
template struct ReachSlots<&Workspace::memory_>;

std::int64_t workspace_of(ParallelGroup& group) {
  std::int64_t sum = 0;
  for (const Tensor& memory : slots_of(GroupAccess::state(group).workspace))
    sum += memory.defined() ? memory.numel() : 0;
  return sum;
}

// Of one rank: what it gave its transport for others.
struct Count {
  std::int64_t bytes = 0;
  bool counts = false;
  int skipped = 0;  // batches that are not counted
};

class CountingCommunicator final : public Communicator {
 public:
  CountingCommunicator(std::shared_ptr<Communicator> inner, std::shared_ptr<Count> count)
      : Communicator(inner->rank(), inner->size(), inner->timeout()),
        inner_(std::move(inner)),
        count_(std::move(count)) {}

  std::unique_ptr<Pending> start(Operation operation, std::span<const SendBlock> sends,
                                 std::span<const ReceiveBlock> receives, DLDevice device) override {
    if (count_->counts && count_->skipped > 0) {
      --count_->skipped;
    } else if (count_->counts) {
      for (const SendBlock& block : sends) count_->bytes += block.rank == rank() ? 0 : block.bytes;
    }
    return inner_->start(operation, sends, receives, device);
  }
  std::shared_ptr<Communicator> split(int colour, int key) override {
    return std::make_shared<CountingCommunicator>(inner_->split(colour, key), count_);
  }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }

 private:
  std::shared_ptr<Communicator> inner_;
  std::shared_ptr<Count> count_;
};

struct Measured {
  std::vector<std::int64_t> sent, workspace;  // by rank
};

Measured measure(const planner::Work& work, const Mesh& mesh) {
  const int ranks = mesh.ulysses * mesh.second();
  Measured measured{std::vector<std::int64_t>(ranks), std::vector<std::int64_t>(ranks)};
  Capabilities can = ditattn::testing::toy_capabilities();
  can.joint = true;
  const BackendClass backend = std::make_shared<ditattn::testing::ToyBackend>("TOY", 1, can);
  const DLDataType dtype = work.element == 4 ? kFloat32 : kBFloat16;
  const auto tensor = [&](std::int64_t tokens, std::int64_t heads) {
    return ditattn::testing::counting({work.batch, tokens, heads, work.head_size}, dtype);
  };
  AttentionMetadata metadata;
  if (work.text > 0) {
    AttentionMetadataFields fields{.joint_query = tensor(work.text, work.heads),
                                   .joint_key = tensor(work.text, work.kv_heads),
                                   .joint_value = tensor(work.text, work.kv_heads)};
    fields.joint_strategy = work.text_first ? "front" : "rear";
    metadata = AttentionMetadata(std::move(fields));
  }
  run_ranks(ranks, [&](const std::shared_ptr<Communicator>& world) {
    const auto count = std::make_shared<Count>();
    const auto group = std::make_shared<ParallelGroup>(std::make_shared<CountingCommunicator>(world, count), mesh);
    ParallelAttention layer(
        backend, {.num_heads = work.heads, .head_size = work.head_size, .num_kv_heads = work.kv_heads}, group);
    const auto rank = static_cast<std::size_t>(world->rank());
    const Tensor query = tensor(balanced_lengths(work.rows, ranks)[rank], work.heads);
    const Tensor key = tensor(balanced_lengths(work.keys, ranks)[rank], work.kv_heads);
    *count = {.bytes = 0, .counts = true, .skipped = 1};  // ranks agree on shapes first
    layer.forward(query, key, key, metadata);
    measured.sent[rank] = count->bytes;
    measured.workspace[rank] = workspace_of(*group);
  });
  return measured;
}

planner::Work draw(std::mt19937_64& random) {
  const auto number = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const std::int64_t kv_heads = number(1, 5);
  return {.batch = number(1, 2),
          .heads = kv_heads * number(1, 4),
          .kv_heads = kv_heads,
          .rows = number(1, 40),
          .keys = number(1, 40),
          .text = number(0, 2) == 0 ? number(1, 9) : 0,
          .head_size = number(1, 4) * 2,
          .element = number(0, 1) == 0 ? 2 : 4,
          .causal = false,
          .text_first = number(0, 1) == 0};
}

TEST(PlannerLayout, SendsAndKeepsWhatParallelAttentionDoes) {
  const char* seed = std::getenv("DITATTN_TEST_SEED");
  std::mt19937_64 random(seed == nullptr ? 12 : std::strtoull(seed, nullptr, 10));
  int problems = 0;
  for (const int ranks : {1, 2, 3, 4, 6, 8}) {
    for (const Mesh& mesh : meshes_of(ranks)) {
      for (int i = 0; i < 8; ++i) {
        const planner::Work work = draw(random);
        SCOPED_TRACE(fmt::format("{}: B={} H={} Hkv={} Sq={} Skv={} T={} D={} element={}", mesh_name(mesh), work.batch,
                                 work.heads, work.kv_heads, work.rows, work.keys, work.text, work.head_size,
                                 work.element));
        const Measured measured = measure(work, mesh);
        const planner::Layout layout(work, mesh);
        for (int rank = 0; rank < ranks; ++rank) {
          SCOPED_TRACE(fmt::format("rank {}", rank));
          EXPECT_EQ(layout.sent_bytes(rank), measured.sent[static_cast<std::size_t>(rank)]);
          EXPECT_EQ(layout.workspace_bytes(rank), measured.workspace[static_cast<std::size_t>(rank)]);
        }
        ++problems;
      }
    }
  }
  fmt::print("{} problems: bytes sent and workspace of every rank to the byte\n", problems);
}

// What the table of meshes in docs/parallel.md says in words: a ring of two sends half of K and V, once.
TEST(PlannerLayout, ByHand) {
  const planner::Work work{.batch = 1, .heads = 8, .kv_heads = 2, .rows = 100, .keys = 60, .head_size = 16};
  const planner::Layout ring(work, {.ring = 2});
  EXPECT_EQ(ring.sent_bytes(0), 2 * 30 * 2 * 16 * 2);
  const planner::Layout ulysses(work, {.ulysses = 4});  // two query heads and one of the two K/V heads each
  EXPECT_EQ(ulysses.kv_copies(), 4);
  EXPECT_EQ(ulysses.sent_bytes(0), 25 * 6 * 16 * 2 + 2 * 15 * 3 * 16 * 2 + 75 * 2 * 16 * 2);
  EXPECT_EQ(ulysses.tensor_bytes(3), 2 * 25 * 8 * 16 * 2 + 2 * 15 * 2 * 16 * 2);
}

}  // namespace
}  // namespace ditattn::parallel
