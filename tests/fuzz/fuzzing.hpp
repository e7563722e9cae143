#pragma once

/// What the fuzzers share. Each is one `LLVMFuzzerTestOneInput`; docs/fuzzing.md says what each holds.

#include <ditattn/errors.hpp>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>

namespace ditattn::fuzzing {

/// tvm-ffi prints a trace at a fault of memory and ends the process; libFuzzer, which keeps the input, handles only
/// what nobody else does.
inline const auto tvm_ffi_handler = std::signal(SIGSEGV, SIG_DFL);

/// Calls `body`. The library's own errors are answers; whatever else is thrown ends the process, which is a finding.
template <class Body>
void allow_errors(Body&& body) {
  try {
    body();
  } catch (const Error&) {
  }
}

/// A promise that was not kept: a finding.
inline void require(bool holds, const std::string& promise) {
  if (holds) return;
  std::cerr << "broken promise: " << promise << '\n';
  std::abort();
}

/// A file of this process in the folder for temporary files (scripts/fuzz.sh gives each run one).
inline std::filesystem::path scratch_file(const std::string& name) {
  return std::filesystem::temp_directory_path() / ("ditattn-fuzz-" + std::to_string(::getpid()) + "-" + name);
}

inline void write_file(const std::filesystem::path& file, const char* bytes, std::size_t size) {
  std::ofstream(file, std::ios::binary).write(bytes, static_cast<std::streamsize>(size));
}

}  // namespace ditattn::fuzzing
