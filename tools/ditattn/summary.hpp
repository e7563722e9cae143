#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tools/ditattn/comparison.hpp"

namespace ditattn::cli {

/// The largest rel_l2 that the verdict on layers allows where --max-error gives none. A convention: a sampler's
/// pictures then differ by what only a comparison shows (examples/digits/README.md has figures).
inline constexpr double kDefaultTolerance = 1e-2;

/// One backend over several cases.
struct Summary {
  std::int64_t cases = 0;                     ///< of which it has an error
  std::int64_t missing = 0;                   ///< that it refused or could not finish
  double worst = 0;                           ///< largest rel_l2; NaN where any is
  std::string worst_at = {};                  ///< the level of that case
  std::optional<double> relative_speed = {};  ///< geometric mean; 1 is the fastest exact one of each case
};

/// A layer over its levels, or a level over its layers.
struct SummaryRow {
  std::string name;
  std::vector<Summary> backends;  ///< as `CaptureSummary::backends`
};

/// Which layers a backend that is not exact may be used for.
struct LayerVerdict {
  std::string backend;
  std::vector<std::size_t> within = {};       ///< indices of `CaptureSummary::layers`, the largest error first
  std::vector<std::size_t> beyond = {};       ///< likewise; layers it refused are last
  std::optional<double> relative_speed = {};  ///< over the layers within
};

/// Cases of captures, by layer and by step or noise level.
struct CaptureSummary {
  double tolerance = kDefaultTolerance;
  bool is_tolerance_given = false;
  std::vector<std::string> backends = {};           ///< those that are available
  std::vector<SummaryRow> layers = {};              ///< in the order of their first cases
  std::vector<SummaryRow> levels = {};              ///< by step, else by noise level
  std::vector<std::vector<SummaryRow>> cells = {};  ///< [layer][level]
  std::vector<LayerVerdict> verdicts = {};
};

/// True where the error is known and within the tolerance for every case.
bool is_tolerated(const Summary& summary, double tolerance);

/// None where fewer than two cases come from captures.
std::optional<CaptureSummary> summarize(const Comparison& comparison);

/// All cases in one row, "all": what the overview shows.
SummaryRow summarize_all(const Comparison& comparison, const std::vector<std::string>& backends);

/// The members that are available, in their order.
std::vector<std::string> available_backends(const Comparison& comparison);

/// How fast a backend is, where 1 is the fastest exact one of the case; none where one of the two was not timed.
std::optional<double> relative_speed(const CaseResult& result, const BackendResult& entry);

Json to_json(const CaptureSummary& summary);

/// One row per layer, or per level; one column per backend.
Table layer_table(const CaptureSummary& summary);
Table level_table(const CaptureSummary& summary);

/// Tables by layer and by level, and the verdicts, for people.
std::string format_summary(const CaptureSummary& summary, bool colour);

/// The lines of the verdicts: which layers tolerate which backend.
std::vector<std::string> verdict_lines(const CaptureSummary& summary);

}  // namespace ditattn::cli
