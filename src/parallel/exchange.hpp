#pragma once

/// Tokens of all heads against all tokens of some heads, and back; and keys from rank to rank.

#include <memory>
#include <span>
#include <vector>

#include "parallel/group.hpp"

namespace ditattn::parallel {

/// Gives each rank of `ulysses` its heads of this rank's tokens, and collects this rank's heads of everybody's: several
/// tensors in one batch.
class HeadScatter {
 public:
  /// What stays on this rank goes with `first`, another part's, where there is one.
  HeadScatter(Communicator& ulysses, Workspace& workspace, int part, HeadScatter* first = nullptr)
      : ulysses_(ulysses), workspace_(workspace), part_(part), first_(first) {}

  /// `mine` (B, tokens[rank], all heads, D). Returns what is collected in `kept`, token-major. `sent`: where what is
  /// sent is put together.
  Tensor add(Slot sent, Slot kept, const Tensor& mine, std::span<const Range> heads,
             std::span<const std::int64_t> tokens);

  std::unique_ptr<Pending> start(Meanwhile meanwhile);

 private:
  Communicator& ulysses_;
  Workspace& workspace_;
  int part_;
  HeadScatter* first_;
  DLDevice device_ = kCpu;
  std::vector<SendTokens> sends_;
  std::vector<ReceiveBlock> receives_;
  std::vector<TokenCopy> own_;
};

/// The way back. What stays on this rank is not sent but copied.
class HeadGather {
 public:
  HeadGather(Communicator& ranks, Workspace& workspace, int part) : ranks_(ranks), workspace_(workspace), part_(part) {}

  /// `mine` (token-major, everybody's rows, this rank's heads) becomes `to` (B, this rank's rows, all heads, D).
  void add_rows(Slot received, const Tensor& mine, const Tensor& to, std::span<const Range> heads,
                std::span<const std::int64_t> tokens);
  /// `to` (B, rows, all heads, D) on every rank, of which rank r has rows[r] and heads[r] in `mine` (token-major).
  void add_shared(Slot received, const Tensor& mine, const Tensor& to, std::span<const Range> rows,
                  std::span<const Range> heads);

  /// On its way the stream puts in place what stays on this rank, and what `before` brought.
  void start(Operation operation, Meanwhile meanwhile, std::span<HeadGather> before);
  /// The same for one that will be `before` another.
  void start_first(Operation operation);
  /// After it, in this thread's stream, everything is in its place.
  void finish();

 private:
  Communicator& ranks_;
  Workspace& workspace_;
  int part_;
  std::vector<TokenCopy> own_;
  std::vector<TokenCopy> unpacking_;
  std::vector<SendTokens> sends_;
  std::vector<ReceiveBlock> receives_;
  std::unique_ptr<Pending> pending_;
};

/// One step of a ring: this rank's token-major tensors go to the next rank, those of the rank before come.
std::unique_ptr<Pending> pass_on(Communicator& ring, std::span<const Tensor> mine, std::span<const Tensor> theirs);

/// All ranks' tokens, of which rank r has chunks[r]: `from` becomes `to`, both token-major.
std::unique_ptr<Pending> gather_tokens(Communicator& second, std::span<const TokenCopy> tensors,
                                       std::span<const Range> chunks);

/// Bytes of a tensor of so many tokens and heads, else like this one.
std::int64_t bytes_of(const Tensor& like, std::int64_t tokens, std::int64_t heads);

}  // namespace ditattn::parallel
