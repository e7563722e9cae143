#pragma once

#include <span>
#include <string>
#include <vector>

#include "ditattn/registry.hpp"

namespace ditattn {

/// An available back end among those that a choice is made of.
struct Candidate {
  DiffusionAttentionBackendEnum member;
  BackendClass backend;

  friend bool operator==(const Candidate&, const Candidate&) = default;
};

/// What speaks against a candidate for `problem`: its own reasons, or that it aligns causality otherwise than `first`,
/// unless both rules come to the same.
Verdict verdict_on(const Candidate& candidate, const Candidate& first, const Problem& problem);

/// The member as a candidate. ImportError, or a ValueError of the registry, where its class cannot be had or cannot run
/// here.
Candidate candidate_of(DiffusionAttentionBackendEnum member);

/// All members that can run here but those of `others`, in their order.
std::vector<Candidate> available_beside(std::span<const Candidate> others);

}  // namespace ditattn
