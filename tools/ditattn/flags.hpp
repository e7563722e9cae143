#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "ditattn/registry.hpp"
#include "tools/ditattn/inputs.hpp"

namespace ditattn::cli {

/// A backend name from the command line, in any case. UnknownBackendError for what is no member.
DiffusionAttentionBackendEnum parse_member(const std::string& name);

/// "A,B": members in the order given, each once. UsageError for an empty entry.
std::vector<DiffusionAttentionBackendEnum> parse_members(const std::string& names);

/// float32, float16 or bfloat16, long or short; UsageError otherwise.
DLDataType parse_float_dtype(const std::string& name);

/// "B,H,Sq,Skv,D", each from 1 to 2³¹ − 1; UsageError otherwise.
std::vector<std::int64_t> parse_shape(const std::string& text);

/// "cpu" or "cuda", the first GPU (UsageError otherwise); ImportError where this machine has none.
DLDevice parse_device(const std::string& device);

/// UsageError for a bad DITATTN_NUM_THREADS, which the library would meet only inside a kernel.
void check_thread_count();

/// "NAME=package.module.Class": registers each class path for the member NAME (any case), which is defined if there is
/// none. UsageError for other forms. Nothing is loaded.
void register_backends(const std::vector<std::string>& registrations);

/// Adds `--json` to a verb.
void add_json_flag(CLI::App& verb, bool& json);

/// Adds what a call knows beside the tensors of its file.
void add_call_flags(CLI::App& verb, CallOptions& options);

/// A check for options: a finite number, not below `lowest`.
CLI::Validator number_from(double lowest = std::numeric_limits<double>::lowest());

}  // namespace ditattn::cli
