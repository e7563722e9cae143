#pragma once

/// Random problems over all metadata: joint tokens, packed sequences, valid prefixes, spans with query ranges, masks,
/// GQA, causal.

#include <ditattn/ditattn.hpp>

#include <string>

namespace ditattn::conformance {

struct Drawn {
  ImplConfig config;
  Tensor query, key, value;
  AttentionMetadata metadata;
  std::int64_t rows = 0;  ///< of the output: joint ones too
  std::string text;       ///< names it
};

/// The same for the same seed, with a head size and a dtype that `can` takes; the rest it may refuse.
Drawn draw_problem(std::uint64_t seed, const Capabilities& can);

}  // namespace ditattn::conformance
