#pragma once

#include <filesystem>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/tuner.hpp"
#include "tuner/tuned_for.hpp"

namespace ditattn {

/// Whether two problems are measured alike: all but their device, and whether an LSE is wanted, which no backend's
/// speed depends on to speak of.
DITATTN_API bool same_measurement(const Problem& a, const Problem& b);

/// What becomes of older results of the same problem, of back ends that were not asked this time.
enum class Others { dropped, kept };

/// Puts a measurement at the end, in the place of the same problem's older one, with its results in order.
DITATTN_API void put_tuned(std::vector<TunedProblem>& all, TunedProblem measured, Others others);

/// Orders results as `TunedProblem` has them.
void sort_results(std::vector<TunedResult>& results);

/// Reads a cache's file: what was measured for `environment`, in the file's order; nothing where there is no file. A
/// file that is damaged, of another format or of another environment is logged (warning) and put aside under its name
/// with ".set-aside", unless `is_frozen`: then it stays, as does one that cannot be opened (logged too). Throws nothing
/// but std::bad_alloc.
DITATTN_API std::vector<TunedProblem> read_tune_cache(const std::filesystem::path& file, const TunedFor& environment,
                                                      bool is_frozen);

/// Adds problems to the file, as `put_tuned` does. Processes that publish at the same time
/// take turns, so that both have their say; readers see the file as it was or as it is. FileError where it cannot be
/// written, or is there and cannot be opened.
DITATTN_API void publish_tuned(const std::filesystem::path& file, const TunedFor& environment,
                               const std::vector<TunedProblem>& problems, Others others);

/// The same, of measurements of everybody.
DITATTN_API void publish_tuned(const std::filesystem::path& file, const TunedFor& environment,
                               const std::vector<TunedProblem>& problems);

}  // namespace ditattn
