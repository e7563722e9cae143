#pragma once

#include <string>
#include <vector>

#include "ditattn/registry.hpp"

namespace ditattn {

/// An available backend of a platform's list.
struct Candidate {
  DiffusionAttentionBackendEnum member;
  BackendClass backend;

  friend bool operator==(const Candidate&, const Candidate&) = default;
};

/// What speaks against a candidate for `problem`: its own reasons, or that it aligns causality otherwise than `first`.
Verdict verdict_on(const Candidate& candidate, const Candidate& first, const Problem& problem);

/// The first candidate that takes `problem`, `candidates.size()` if none does; the reasons of those before it, each
/// with its member's name, are appended to `refusals`. A causal problem whose diagonal the first candidate aligns
/// otherwise than a later one is refused for that one, unless both rules come to the same.
std::size_t first_that_takes(const std::vector<Candidate>& candidates, const Problem& problem,
                             std::vector<std::string>& refusals);

/// One class over the candidates (one at least), which passes each call to the first that takes it. The same object for
/// the same candidates.
BackendClass default_backend(const std::vector<Candidate>& candidates);

}  // namespace ditattn
