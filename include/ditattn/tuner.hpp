#pragma once

/// Choice by measurement: which backend was the fastest for a problem on this machine, within an error. What is
/// measured once is kept in a file, by which later processes choose where code names no backend.
///
///     tune({.num_heads = 24, .num_kv_heads = 24, .seq_q = 4096, .seq_kv = 4096, .head_size = 128});
///     Tensor out = attention(query, key, value);  // by the fastest of the exact ones
///
/// Nothing is measured unless asked for: by `tune`, `ditattn tune`, or DITATTN_TUNE=online. A default's look-up takes
/// less than 200 ns.

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/export.hpp"
#include "ditattn/registry.hpp"

namespace ditattn {

/// How one backend did on one problem.
struct TunedResult {
  std::string backend;     ///< the member's name
  std::string class_path;  ///< of what it stood for: what is registered in its place later was not measured
  std::string engine;      ///< as its capabilities have it, versions included
  double median_ms = 0;    ///< of one call, from the host's clock, with the device's work done; 0: not timed
  /// ‖out − ref‖ / ‖ref‖ against float64 over sampled rows. NaN: elements that are NaN or infinite where the reference
  /// is not, or numbers in rows that see no key.
  double error = 0;
  std::string reason = {};  ///< why it cannot be chosen: it refused, or broke down; empty otherwise
};

/// What was measured for one problem: usable results first, the fastest of them first.
struct TunedProblem {
  Problem problem;                   ///< exactly this one
  std::vector<TunedResult> results;  ///< one per back end that was asked, now or before
};

/// The largest `TunedResult::error` of a backend that counts as exact: some times what rounding inputs, probabilities
/// and output to `dtype` costs, and some times less than what quantized products do.
DITATTN_API double exact_error(DLDataType dtype);

/// How `tune` measures.
struct TuneOptions {
  /// Who is measured; empty: all members that can run here. What was measured of others before is kept, and returned
  /// with the rest.
  std::vector<DiffusionAttentionBackendEnum> members = {};
  /// Milliseconds of timed rounds, of all backends together; they are stretched to three rounds at least.
  double budget_ms = 600;
  std::uint64_t seed = 0;  ///< of random inputs, and of the rows that errors are measured on
  /// Whether the result goes to the cache's file, beside being used by this process.
  bool publish = true;
  /// Told of each step, for people who wait.
  std::function<void(std::string_view)> report = {};
};

/// Measures a problem with standard normal tensors (where it has a padding mask: with the last quarter of the keys
/// padded; a dense one: a quarter of it masked, at random): every backend that takes it and keeps the causal rule of
/// the platform's default, in interleaved rounds. One that is over three times slower than another that is no less
/// exact is timed once. Results replace older ones of the same problem. NotImplementedError for packed sequences
/// and spans, which have no typical shape: `tune_call` takes real ones. MemoryError where memory cannot be had.
/// Thread-safe.
DITATTN_API TunedProblem tune(const Problem& problem, const TuneOptions& options = {});

/// The same for given tensors. `config`'s prefix and role do not matter.
DITATTN_API TunedProblem tune_call(const ImplConfig& config, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const AttentionMetadata& metadata = {},
                                   const TuneOptions& options = {});

/// What is known of a problem: of exactly this, or else of one whose lengths, and batch · heads, differ by less than a
/// quarter of a power of two; results that still hold. None where nothing is, and with DITATTN_TUNE=off. Thread-safe.
DITATTN_API std::optional<TunedProblem> tuned(const Problem& problem);

/// The member that a default chooses for `problem` by measurement: the fastest whose error is at most `max_error`
/// (none: `exact_error`), unless the platform's own order has one that is at most 2 % slower. One whose output was not
/// finite, for any problem of this dtype, is never chosen; one whose error was too large for some problem, for none
/// that was not measured. None where nothing usable was measured.
DITATTN_API std::optional<DiffusionAttentionBackendEnum> tuned_member(const Problem& problem,
                                                                      std::optional<double> max_error = std::nullopt);

/// All that is known for a device, in the order of the cache.
DITATTN_API std::vector<TunedProblem> tuned_problems(DLDevice device);

/// The file for a device, present or not: in DITATTN_TUNE_CACHE, or else `ditattn` in the user's cache folder; named by
/// what measurements depend on (device, driver, versions, threads), which it also says inside. Empty where there is no
/// folder.
DITATTN_API std::string tune_cache_file(DLDevice device);

/// Reads the files again: what other processes have published since. Layers ask at their next call.
DITATTN_API void reload_tuned();

}  // namespace ditattn
