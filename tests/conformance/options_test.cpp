// backend_kwargs["num_threads"], which all CPU backends take.

#include <ditattn/ditattn.hpp>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "tests/conformance/run_case.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn::conformance {
namespace {

Tensor ones() {
  Tensor tensor = empty({2, 600, 4, 64}, kFloat32);
  std::fill_n(static_cast<float*>(tensor.data_ptr()), tensor.numel(), 1.F);
  return tensor;
}

std::unique_ptr<AttentionImpl> make(const NamedBackend& backend, BackendKwargs kwargs) {
  return backend.backend->make({.num_heads = 4, .head_size = 64, .backend_kwargs = std::move(kwargs)});
}

int threads_of_this_process() {
  std::ifstream stream("/proc/self/status");
  for (std::string line; std::getline(stream, line);) {
    if (line.starts_with("Threads:")) return std::stoi(line.substr(8));
  }
  return -1;
}

// A forked child has no workers yet: those that appear are what the layer asked for.
TEST(Options, NumThreadsLimitsTheLayer) {
  for (const NamedBackend& backend : cpu_backends()) {
    const int status = testing::status_in_child([&] {
      set_num_threads(4);
      const Tensor x = ones();
      make(backend, {{"num_threads", std::int64_t{1}}})->forward(x, x, x);
      if (threads_of_this_process() != 1) return 1;
      make(backend, {{"num_threads", std::int64_t{3}}})->forward(x, x, x);
      if (threads_of_this_process() != 3) return 2;
      make(backend, {{"num_threads", std::int64_t{100}}})->forward(x, x, x);
      return threads_of_this_process() == 4 ? 0 : 3;
    });
    EXPECT_EQ(status, 0) << backend.member;
  }
}

TEST(Options, NumThreadsChangesNoBit) {
  for (const NamedBackend& backend : cpu_backends()) {
    const Tensor x = ones();
    const Tensor all = make(backend, {})->forward(x, x, x);
    const Tensor one = make(backend, {{"num_threads", std::int64_t{1}}})->forward(x, x, x);
    EXPECT_EQ(std::memcmp(all.data_ptr(), one.data_ptr(), static_cast<std::size_t>(all.numel()) * 4), 0)
        << backend.member;
  }
}

TEST(Options, NumThreadsRefusesWhatIsNoCount) {
  for (const NamedBackend& backend : cpu_backends()) {
    for (const std::int64_t bad : {0, -1}) {
      const std::string text = testing::error_text<ValueError>([&] { make(backend, {{"num_threads", bad}}); });
      testing::expect_contains(text, {backend.member, "num_threads", std::to_string(bad), "from 1"});
    }
    testing::expect_contains(testing::error_text<ValueError>([&] {
                               make(backend, {{"num_threads", tvm::ffi::String("two")}});
                             }),
                             {backend.member, "'two', not a whole number"});
  }
}

}  // namespace
}  // namespace ditattn::conformance
