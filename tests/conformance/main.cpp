// The conformance program: GoogleTest over the committed cases, and two modes of its own over the same code:
//   --full[=N]     every combination of the fields marked in cases/space.txt (or N spread over them)
//   --dump=DIR     writes inputs and the oracle's output of some pairwise cases for torch_check.py
// --seed=N or DITATTN_TEST_SEED chooses other random inputs; --backends=A,B only these members; --device=cuda has the
// case files run on the first GPU; --problems=N draws so many random problems for each back end.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <charconv>
#include <cstdlib>
#include <exception>
#include <string_view>

#include "tests/conformance/options.hpp"

namespace ditattn::conformance {

Options& options() {
  static Options instance;
  return instance;
}

namespace {

std::uint64_t parse_count(std::string_view flag, std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw std::runtime_error(fmt::format("{}: '{}' is not a whole number", flag, text));
  }
  return value;
}

struct Mode {
  bool full = false;
  std::uint64_t full_count = 0;  // 0: all
  std::string dump;
};

Mode parse_arguments(int argc, char** argv) {
  Mode mode;
  if (const char* seed = std::getenv("DITATTN_TEST_SEED")) options().seed = parse_count("DITATTN_TEST_SEED", seed);
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const std::string_view flag = argument.substr(0, argument.find('='));
    const std::string_view value = flag.size() < argument.size() ? argument.substr(flag.size() + 1) : "";
    if (flag == "--seed") {
      options().seed = parse_count(flag, value);
    } else if (flag == "--backends") {
      options().backends = value;
    } else if (flag == "--device" && (value == "cpu" || value == "cuda")) {
      options().device = value == "cpu" ? kCpu : DLDevice{kDLCUDA, 0};
    } else if (flag == "--problems") {
      options().problems = parse_count(flag, value);
    } else if (flag == "--dump") {
      mode.dump = value;
    } else if (flag == "--full") {
      mode.full = true;
      if (!value.empty()) mode.full_count = parse_count(flag, value);
    } else {
      throw std::runtime_error(fmt::format(
          "unknown flag {}. Flags: --full[=N], --dump=DIR, --seed=N, --backends=A,B, --device=cpu|cuda, --problems=N",
          argument));
    }
  }
  return mode;
}

}  // namespace
}  // namespace ditattn::conformance

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  try {
    const auto mode = ditattn::conformance::parse_arguments(argc, argv);
    if (ditattn::conformance::options().device.device_type == kDLCUDA && ditattn::cuda_info().devices.empty()) {
      fmt::print("skipped: no CUDA device ({})\n", ditattn::cuda_info().reason);
      return 77;
    }
    if (mode.full) return ditattn::conformance::run_full(mode.full_count);
    if (!mode.dump.empty()) return ditattn::conformance::dump_cases(mode.dump);
  } catch (const std::exception& error) {
    fmt::print(stderr, "conformance: {}\n", error.what());
    return 2;
  }
  return RUN_ALL_TESTS();
}
