#pragma once

/// From sizes to milliseconds: kernels, copies, messages.

#include "ditattn/planner.hpp"
#include "parallel/heads.hpp"
#include "planner/layout.hpp"

namespace ditattn::planner {

/// A request with its figures found.
struct Machine {
  const GpuFigures& gpu;
  const KernelFigures& kernel;
  const LinkFigures& inside;   ///< a node
  const LinkFigures& between;  ///< nodes
  int gpus_per_node;

  /// One call of the back end: `pairs` of the rows × keys are seen.
  [[nodiscard]] double attention_ms(const Work& work, std::int64_t heads, std::int64_t rows, std::int64_t keys,
                                    double pairs) const;
  /// A kernel that reads and writes so many bytes.
  [[nodiscard]] double copy_ms(std::int64_t bytes) const;
  /// From start to end of a batch, for the rank that takes longest. `batches`: of all ranks.
  [[nodiscard]] double exchange_ms(const std::vector<Batch>& batches, int ranks) const;
  [[nodiscard]] double message_ms(const Message& message) const;
  /// What carries a message, or the slowest of a batch.
  [[nodiscard]] const LinkFigures& link_of(const Message& message) const {
    return message.from / gpus_per_node != message.to / gpus_per_node ? between : inside;
  }
  [[nodiscard]] const LinkFigures& link_of(const Batch& batch) const;
};

/// Until both are done that begin together.
double beside_ms(double computing_ms, double transfer_ms, const LinkFigures& link);

/// How Ulysses exchanges heads: what is put together for it, and in which parts, of which the first is waited for
/// before anything is computed and the last afterwards.
struct HeadExchange {
  bool as_they_lie = false;  ///< nothing is put together to be sent
  parallel::Cut cut = {};
  double first = 1;  ///< share of the heads in the first part
  double last = 1;   ///< and in the last
};
HeadExchange head_exchange(const Layout& layout, const Machine& machine);

/// How many keys of `keys` the rows `rows` see, in joined order.
double visible_pairs(const Work& work, Range rows, Range keys);

/// All ranks' batches of one kind, or a share of their bytes: until the slowest rank is done.
double exchange_ms(const Layout& layout, const Machine& machine, Batch (Layout::*batch)(int) const, double share = 1);

/// What the ranks of one column or of one rank take between the exchanges.
struct Phase {
  double ms = 0;  ///< to the end, waiting included
  double attention_ms = 0;
  double copying_ms = 0;
};
/// Attention with all keys, which the parts of `heads` between the first and the last are exchanged beside, or by ring
/// or allgather: the rank that ends last.
Phase compute_phase(const Layout& layout, const Machine& machine, const HeadExchange& heads);

}  // namespace ditattn::planner
