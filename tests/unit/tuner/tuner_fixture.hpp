#pragma once

/// A cache of tuned choices of a test's own: nothing is known at first.

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "ditattn/tuner.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tuner/tune_cache.hpp"

namespace ditattn::testing {

/// An empty folder that goes with its owner.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "ditattn-test-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "no temporary folder: " << name;
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  /// Names of what is in it, sorted.
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) result.push_back(entry.path().filename());
    std::sort(result.begin(), result.end());
    return result;
  }

 private:
  std::filesystem::path path_;
};

class TunerTest : public RegistryTest {
 protected:
  void SetUp() override { reload_tuned(); }
  void TearDown() override {
    RegistryTest::TearDown();
    reload_tuned();
  }

  /// What measuring a member would have given.
  static TunedResult measured(DiffusionAttentionBackendEnum member, double median_ms, double error,
                              std::string reason = {}) {
    return {.backend = member.name(),
            .class_path = member.get_path(),
            .engine = member.get_class()->capabilities().engine,
            .median_ms = median_ms,
            .error = error,
            .reason = std::move(reason)};
  }

  /// Puts a measurement into the cache's file, as another process would, and reads that again.
  static void know(const Problem& problem, const std::vector<TunedResult>& results) {
    publish_tuned(tune_cache_file(kCpu), tuned_for(kCpu), {{problem, results}});
    reload_tuned();
  }

  const TemporaryFolder folder_;
  const ScopedEnvironment cache_{"DITATTN_TUNE_CACHE", folder_.path().c_str()};
  const ScopedEnvironment mode_{"DITATTN_TUNE", "use"};
  const ScopedEnvironment unset_{"DIFFUSION_ATTENTION_BACKEND", nullptr};
};

}  // namespace ditattn::testing
