// kernels/cpu alone: no library, no plug-ins, no tvm-ffi, so that it builds for machines the library does not build
// for. Usage: kernels_cpu [--seed=N] [--problems=N] [GoogleTest's flags]

#include <gtest/gtest.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "tests/kernels/check.hpp"
#include "tests/kernels/options.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

class Report : public ::testing::Environment {
 public:
  void SetUp() override { std::printf("--seed=%" PRIu64 " repeats this run\n", options().seed); }
  void TearDown() override { print_errors(); }
};

}  // namespace

Options& options() {
  static Options options{.seed = std::random_device()(), .problems = 300};
  return options;
}

}  // namespace ditattn::kernels::cpu::testing

int main(int argc, char** argv) {
  using namespace ditattn::kernels::cpu::testing;
  ::testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const char* value = std::strchr(argv[i], '=');
    if (value != nullptr && std::strncmp(argv[i], "--seed=", 7) == 0) {
      options().seed = std::strtoull(value + 1, nullptr, 10);
    } else if (value != nullptr && std::strncmp(argv[i], "--problems=", 11) == 0) {
      options().problems = std::strtoll(value + 1, nullptr, 10);
    } else {
      std::fprintf(stderr, "kernels_cpu: unknown argument '%s'\n", argv[i]);
      return 2;
    }
  }
  ::testing::AddGlobalTestEnvironment(new Report);
  return RUN_ALL_TESTS();
}
