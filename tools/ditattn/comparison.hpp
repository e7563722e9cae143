#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/parallel.hpp"
#include "ditattn/problem.hpp"
#include "tools/ditattn/accuracy.hpp"
#include "tools/ditattn/ceilings.hpp"
#include "tools/ditattn/machine.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/table.hpp"

namespace ditattn::cli {

enum class Status {
  ok,
  unavailable,  ///< cannot run on this machine
  unsupported,  ///< cannot do this problem
  failed,       ///< broke down, or gave NaN or infinity where the oracle does not
};
const char* status_name(Status status);

struct Timing {
  double median_ms = 0;
  double min_ms = 0;
  double tflops = 0;  ///< operations(problem) / median
};

/// One backend on one case.
struct BackendResult {
  std::string backend;
  std::string engine;  ///< its kernel for this case, where it tells; empty where the class cannot be imported
  Status status = Status::ok;
  std::string reason = {};                ///< why not ok, or why not recommendable
  std::optional<Timing> timing = {};      ///< none where it could not be run to the end
  std::optional<Accuracy> accuracy = {};  ///< none where it gave no output
};

struct CaseResult {
  std::string name;
  Problem problem = {};
  std::optional<std::int64_t> sample_rows = {};  ///< none: errors are of the whole output
  double error_bound = 0;                        ///< largest rel_l2 that is recommended
  double exact_bound = 0;                        ///< largest rel_l2 that rounding explains
  std::vector<BackendResult> results = {};
  std::vector<BackendResult> over_ranks = {};  ///< the same backends over all ranks; empty without --parallel
  std::optional<std::string> recommended = {};
  std::optional<Place> place = {};  ///< of a capture's cases
};

/// The ranks of --parallel.
struct RanksInfo {
  parallel::Mesh mesh;
  std::string kind;  ///< "threads of one process", "MPI processes"
};

struct Comparison {
  Machine machine;
  std::vector<CaseResult> cases;
  std::optional<double> max_error = {};   ///< as --max-error gave it
  std::optional<Ceilings> ceilings = {};  ///< where they were asked for
  std::optional<RanksInfo> ranks = {};    ///< with --parallel
};

/// True where the error is known and at most `bound`; NaN never is.
bool is_within(const BackendResult& result, double bound);

/// The document of `compare --json`.
Json to_json(const Comparison& comparison);

/// "Case NAME: (B, H, Sq, Skv, D) = …, dtype, …" for people.
std::string describe(const CaseResult& result);

/// One row per backend that is available here.
Table results_table(const CaseResult& result);

/// The same over all ranks, with each backend's time on one; empty without --parallel.
Table ranks_table(const CaseResult& result);

/// "Over 4 ranks (ulysses=2, ring=2), threads of one process; …" for people.
std::string describe(const RanksInfo& ranks);

/// One row per backend that is not, with the reason; empty where all are.
Table unavailable_table(const Comparison& comparison);

/// The whole comparison for people. Of captures with more than eight cases, tables by layer and level stand for those
/// of each case, unless these are asked for.
std::string format_comparison(const Comparison& comparison, bool all_cases, bool colour);

}  // namespace ditattn::cli
