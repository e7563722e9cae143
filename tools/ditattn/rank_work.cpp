#include "tools/ditattn/rank_work.hpp"

#include <fmt/format.h>

#include <array>
#include <cstring>
#include <numeric>
#include <optional>

#include "ditattn/errors.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/inputs.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/ranks.hpp"

namespace ditattn::cli {
namespace {

using parallel::Communicator;

enum class Step : std::int64_t { open, first_output, forward, end };

struct Command {
  Step step;
  std::int64_t number;  // of the case, of the back end, or the status
};

void send(Communicator& world, Command command) {
  std::vector<parallel::SendBlock> blocks;
  for (int rank = 1; rank < world.size(); ++rank) blocks.push_back({rank, &command, sizeof(command)});
  world.start(parallel::Operation::exchange, blocks, {}, kCpu)->wait();
}

Command receive(Communicator& world) {
  Command command{};
  const std::array blocks = {parallel::ReceiveBlock{0, &command, sizeof(command)}};
  world.start(parallel::Operation::exchange, {}, blocks, kCpu)->wait();
  return command;
}

std::int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * (tensor.dtype().bits / 8); }

// Copies the tokens of a contiguous (B, tokens, H, D): `count` of them, from one place to another.
void copy_tokens(const Tensor& to, std::int64_t to_token, const Tensor& from, std::int64_t from_token,
                 std::int64_t count) {
  const std::int64_t token = to.size(2) * to.size(3) * (to.dtype().bits / 8);
  for (std::int64_t batch = 0; batch < to.size(0); ++batch) {
    std::memcpy(static_cast<char*>(data_pointer(to)) + (batch * to.size(1) + to_token) * token,
                static_cast<const char*>(data_pointer(from)) + (batch * from.size(1) + from_token) * token,
                static_cast<std::size_t>(count * token));
  }
}

// This rank's tokens of a contiguous tensor.
Tensor shard(const Tensor& whole, const Communicator& world) {
  const auto lengths = parallel::balanced_lengths(whole.size(1), world.size());
  const std::int64_t begin = std::accumulate(lengths.begin(), lengths.begin() + world.rank(), std::int64_t{0});
  const std::int64_t count = lengths[static_cast<std::size_t>(world.rank())];
  Tensor part = empty({whole.size(0), count, whole.size(2), whole.size(3)}, whole.dtype());
  copy_tokens(part, 0, whole, begin, count);
  return part;
}

std::int64_t text_rows(const Inputs& inputs) {
  const bool joint = inputs.metadata.defined() && inputs.metadata->fields.joint_query.has_value();
  return joint ? inputs.metadata->fields.joint_query.value().size(1) : 0;
}

bool text_first(const Inputs& inputs) { return !inputs.metadata.defined() || inputs.metadata->joint_first(); }

int follow(Rank& rank) {
  for (;;) {
    const Command command = receive(rank.world());
    const auto number = static_cast<std::size_t>(command.number);
    switch (command.step) {
      case Step::open:
        rank.open(number);
        break;
      case Step::first_output:
        try {
          rank.first_output(number);
        } catch (const ValueError&) {  // all ranks refuse alike; rank 0 tells why
        }
        break;
      case Step::forward:
        rank.forward(number);
        break;
      case Step::end:
        return static_cast<int>(command.number);
    }
  }
}

int report_failure() {
  const Failure failure = current_failure();
  print_error(failure.message);
  return failure.status;
}

int lead_others(Rank& rank, const std::function<int(RankLeader&)>& lead) {
  RankLeader leader(rank);
  int status = kDone;
  try {
    status = lead(leader);
  } catch (const CommunicationError&) {
    throw;
  } catch (const TimeoutError&) {
    throw;
  } catch (...) {
    status = report_failure();
  }
  leader.end(status);
  return status;
}

}  // namespace

std::shared_ptr<const Case> SharedCases::get(std::size_t index) {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<const Case> held = index == index_ ? current_.lock() : nullptr;
  if (!held) held = std::make_shared<const Case>(sources_[index].make());
  index_ = index;
  current_ = held;
  return held;
}

Rank::Rank(const std::shared_ptr<Communicator>& world, const parallel::Mesh& mesh, const RankWork& work)
    : world_(world),
      work_(work),
      group_(std::make_shared<parallel::ParallelGroup>(device_communicator(world, work.device), mesh)) {}

void Rank::open(std::size_t index) {
  layers_.clear();
  case_ = work_.cases.get(index);
  const Inputs& inputs = case_->inputs;
  query_ = shard(inputs.query, *world_);
  key_ = shard(inputs.key, *world_);
  value_ = shard(inputs.value, *world_);
  out_ = empty({query_.size(0), query_.size(1) + text_rows(inputs), query_.size(2), query_.size(3)}, query_.dtype());
}

Tensor Rank::first_output(std::size_t backend) {
  ImplConfig config = config_for(case_->inputs);
  config.causal |= work_.causal;
  auto layer = std::make_unique<parallel::ParallelAttention>(work_.backends[backend].backend, config, group_);
  std::memset(out_.data_ptr(), 0xFF, static_cast<std::size_t>(bytes_of(out_)));  // NaN in every float type
  call(*layer);
  layers_[backend] = std::move(layer);
  return gather(out_);
}

void Rank::forward(std::size_t backend) {
  call(*layers_.at(backend));
  world_->barrier();
}

void Rank::call(parallel::ParallelAttention& layer) {
  layer.forward(query_, key_, value_, case_->inputs.metadata, {.out = out_, .lse = {}});
}

// Image rows are their rank's, text rows, the same everywhere, are taken from rank 0.
Tensor Rank::gather(const Tensor& mine) const {
  const auto ranks = static_cast<std::size_t>(world_->size());
  const std::int64_t rows = case_->inputs.query.size(1);
  const std::int64_t text = text_rows(case_->inputs);
  const auto lengths = parallel::balanced_lengths(rows, world_->size());
  std::vector<std::int64_t> sent(ranks, 0);
  std::vector<std::int64_t> received(ranks, 0);
  sent[0] = bytes_of(mine);
  for (std::size_t rank = 0; rank < ranks && world_->rank() == 0; ++rank) {
    received[rank] = mine.size(0) * (lengths[rank] + text) * mine.size(2) * mine.size(3) * (mine.dtype().bits / 8);
  }
  const Tensor all = empty({std::accumulate(received.begin(), received.end(), std::int64_t{0})}, kBool);
  world_->all_to_all(data_pointer(mine), sent, data_pointer(all), received)->wait();
  if (world_->rank() != 0) return {};

  const bool first = text_first(case_->inputs);
  Tensor whole = empty({mine.size(0), rows + text, mine.size(2), mine.size(3)}, mine.dtype());
  copy_tokens(whole, first ? 0 : rows, mine, first ? 0 : lengths[0], text);
  std::int64_t at = first ? text : 0;
  auto* from = static_cast<char*>(data_pointer(all));
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    const Tensor part = wrap(from, {mine.size(0), lengths[rank] + text, mine.size(2), mine.size(3)}, mine.dtype());
    copy_tokens(whole, at, part, first ? text : 0, lengths[rank]);
    at += lengths[rank];
    from += received[rank];
  }
  return whole;
}

// What is wrong with a case is told before the others hear of it: all end in order then.
void RankLeader::open(std::size_t index) {
  const Inputs inputs = rank_.cases().get(index)->inputs;
  check_inputs(inputs, config_for(inputs));
  send(rank_.world(), {Step::open, static_cast<std::int64_t>(index)});
  rank_.open(index);
}

Tensor RankLeader::first_output(std::size_t backend) {
  send(rank_.world(), {Step::first_output, static_cast<std::int64_t>(backend)});
  return rank_.first_output(backend);
}

void RankLeader::forward(std::size_t backend) {
  send(rank_.world(), {Step::forward, static_cast<std::int64_t>(backend)});
  rank_.forward(backend);
}

void RankLeader::end(int status) { send(rank_.world(), {Step::end, status}); }

int do_rank_work(const std::shared_ptr<Communicator>& world, const parallel::Mesh& mesh, const RankWork& work,
                 const std::function<int(RankLeader&)>& lead) {
  std::optional<Rank> rank;
  try {
    rank.emplace(world, mesh, work);
  } catch (const ValueError& error) {  // thrown by all ranks alike, as is the next
    if (world->rank() == 0) print_error(fmt::format("--parallel: {}", error.message()));
    return kUsage;
  } catch (const NotImplementedError&) {
    return world->rank() == 0 ? report_failure() : current_failure().status;
  }
  return world->rank() == 0 ? lead_others(*rank, lead) : follow(*rank);
}

}  // namespace ditattn::cli
