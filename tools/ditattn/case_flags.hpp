#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "tools/ditattn/inputs.hpp"
#include "tools/ditattn/model_cases.hpp"

namespace ditattn::cli {

/// Flags that say which problems are meant: --shape, --input, --model, and how their tensors are made.
struct CaseFlags {
  std::vector<std::string> shapes;
  std::vector<std::string> inputs;
  std::vector<std::string> models;
  std::string dtype;
  std::uint64_t seed = 0;
  CallOptions call;
};

void add_case_flags(CLI::App& verb, CaseFlags& flags);

/// One of the problems, with tensors that are made when it is their turn: all at once could fill the memory.
struct CaseSource {
  std::string name;
  std::function<Case()> make;
};

/// What the flags ask for: files are read, the rest is only checked. UsageError, and ValueError where a model's problem
/// would take minutes on `device`.
std::vector<CaseSource> case_sources(const CaseFlags& flags, DLDevice device);

}  // namespace ditattn::cli
