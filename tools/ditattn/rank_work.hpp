#pragma once

/// What the ranks of `compare --parallel` do together. Rank 0 measures; the others do what it tells them, step by step,
/// so that each waits for another no longer than for one step, or for what rank 0 does alone: the first calls of a case
/// and the oracle, rounds on one rank.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ditattn/parallel.hpp"
#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/case_flags.hpp"

namespace ditattn::cli {

/// One case at a time, which the ranks of a process share. Thread-safe.
class SharedCases {
 public:
  explicit SharedCases(const std::vector<CaseSource>& sources) : sources_(sources) {}
  std::shared_ptr<const Case> get(std::size_t index);

 private:
  const std::vector<CaseSource>& sources_;
  std::mutex mutex_;
  std::size_t index_ = 0;
  std::weak_ptr<const Case> current_;
};

/// The same on all ranks.
struct RankWork {
  SharedCases& cases;
  const std::vector<BackendInfo>& backends;
  DLDevice device = kCpu;
  bool causal = false;  ///< of every case
};

/// One rank, with its part of the current case. Every step is done by all ranks.
class Rank {
 public:
  /// ValueError and NotImplementedError on all ranks alike.
  Rank(const std::shared_ptr<parallel::Communicator>& world, const parallel::Mesh& mesh, const RankWork& work);

  /// Takes this rank's tokens of a case that is right in itself.
  void open(std::size_t index);
  /// Makes a back end's layer and computes once, into memory full of NaN. Returns the whole output on rank 0, a null
  /// tensor on the others. What a rank refuses before anything moves is thrown by all.
  Tensor first_output(std::size_t backend);
  /// Computes again; returns when all ranks have.
  void forward(std::size_t backend);

  [[nodiscard]] parallel::Communicator& world() const { return *world_; }
  [[nodiscard]] const parallel::Mesh& mesh() const { return group_->mesh(); }
  [[nodiscard]] SharedCases& cases() const { return work_.cases; }

 private:
  [[nodiscard]] Tensor gather(const Tensor& mine) const;
  void call(parallel::ParallelAttention& layer);

  std::shared_ptr<parallel::Communicator> world_;
  const RankWork& work_;
  std::shared_ptr<parallel::ParallelGroup> group_;
  std::shared_ptr<const Case> case_;
  Tensor query_, key_, value_, out_;  // this rank's
  std::map<std::size_t, std::unique_ptr<parallel::ParallelAttention>> layers_;
};

/// Rank 0's end: each call is told to the others, and done by all.
class RankLeader {
 public:
  explicit RankLeader(Rank& rank) : rank_(rank) {}
  /// ValueError, before anybody does anything, where the case is wrong in itself.
  void open(std::size_t index);
  Tensor first_output(std::size_t backend);
  void forward(std::size_t backend);
  /// The others return `status`.
  void end(int status);

  [[nodiscard]] const parallel::Mesh& mesh() const { return rank_.mesh(); }

 private:
  Rank& rank_;
};

/// A rank's whole part: rank 0 calls `lead`, the others follow it. All return what `lead` does; what it throws is
/// printed and becomes a status, unless a rank is lost.
int do_rank_work(const std::shared_ptr<parallel::Communicator>& world, const parallel::Mesh& mesh, const RankWork& work,
                 const std::function<int(RankLeader&)>& lead);

}  // namespace ditattn::cli
