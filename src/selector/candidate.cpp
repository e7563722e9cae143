#include "selector/candidate.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "core/interrupt.hpp"

namespace ditattn {
namespace {

// Whether the two causal rules differ for this problem: they agree where as many keys as rows are seen.
bool depends_on_alignment(const Problem& problem) {
  return problem.causal && (problem.seq_q != problem.seq_kv || problem.packed);
}

}  // namespace

Verdict verdict_on(const Candidate& candidate, const Candidate& first, const Problem& problem) {
  Verdict verdict = candidate.backend->explain(problem);
  const auto alignment = [](const Candidate& of) { return of.backend->capabilities().causal_alignment; };
  if (verdict && depends_on_alignment(problem) && alignment(candidate) != alignment(first)) {
    verdict.reasons.push_back(fmt::format("{} aligns causality otherwise than {} ({} queries, {} keys{})",
                                          candidate.member.name(), first.member.name(), problem.seq_q, problem.seq_kv,
                                          problem.packed ? ", packed" : ""));
  }
  return verdict;
}

Candidate candidate_of(DiffusionAttentionBackendEnum member) {
  Candidate candidate{.member = member, .backend = member.get_class()};
  candidate.backend->validate_available();
  return candidate;
}

std::vector<Candidate> available_beside(std::span<const Candidate> others) {
  std::vector<Candidate> more;
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    if (std::ranges::find(others, member, &Candidate::member) != others.end()) continue;
    try {
      more.push_back(candidate_of(member));
    } catch (const tvm::ffi::Error& error) {  // of any language: not to be had here
      if (is_interrupt(error)) throw;
    }
  }
  return more;
}

}  // namespace ditattn
