#pragma once

/// Ranks for tests, and one problem computed by them.

#include <ditattn/ditattn.hpp>
#include <ditattn/parallel.hpp>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "parallel/heads.hpp"
#include "tests/conformance/random_problem.hpp"

namespace ditattn::parallel::testing {

using Body = std::function<void(const std::shared_ptr<Communicator>&)>;

/// What ranks are: threads, unless a program's main says otherwise.
struct Ranks {
  /// Calls the body as each of `size` ranks, or as this process's of them.
  std::function<void(int size, const Body&)> run = [](int size, const Body& body) {
    run_ranks(size, body, Seconds(60));
  };
  /// Numbers of ranks that there are.
  std::vector<int> sizes = {1, 2, 3, 4, 8};
  bool is_first = true;  ///< this process has rank 0, which sees results
  bool are_over_nccl = false;
  int fraction = 1;  ///< of the problems, one of so many is run
  /// Where each rank computes.
  std::function<DLDevice(int rank)> device = [](int /*rank*/) { return kCpu; };
};
Ranks& ranks();

/// The whole's results, contiguous, as rank 0 put them together.
struct Whole {
  Tensor out;
  Tensor lse;
  std::string wrong;  ///< what no number shows: text rows that differ between ranks
};

/// Ranks get `rows[r]` and `keys[r]` tokens. Throws what the ranks throw. `repeats`: calls of the same layer, the last
/// one's results are kept. `cut`: in which parts Ulysses alone computes a rank's heads.
Whole compute(const conformance::Drawn& problem, const BackendClass& backend, const Mesh& mesh,
              const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& keys, int repeats = 1,
              Cut cut = {});

/// A tensor, or metadata, in the memory of `device`.
Tensor on(DLDevice device, const Tensor& tensor);
AttentionMetadata on(DLDevice device, const AttentionMetadata& metadata);

/// Whether two tensors of one shape have the same bits.
bool same_bits(const Tensor& a, const Tensor& b);

}  // namespace ditattn::parallel::testing
