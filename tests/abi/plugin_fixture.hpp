#pragma once

/// Sets the search path to the zoo that CMake built, and leaves the registry as it was.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn::testing {

/// Forwards V = 1, 2, … of shape (1, 3, 2, 2) through 2 heads of size 2.
inline Tensor forward_doubler(const AttentionImpl& attention, const AttentionMetadata& metadata = {},
                              const ForwardOutputs& outputs = {}) {
  return attention.forward(counting({1, 4, 2, 2}), counting({1, 3, 2, 2}), counting({1, 3, 2, 2}, kFloat32, 1),
                           metadata, outputs);
}

/// Whether a Doubler gives right numbers.
inline void expect_doubles(const AttentionBackend& backend) {
  const auto attention = backend.make({.num_heads = 2, .head_size = 2});
  const Tensor out = forward_doubler(*attention);
  ASSERT_EQ(shape_name(out), "(1, 4, 2, 2)");
  for (int i = 0; i < 16; ++i) EXPECT_EQ(load_element(data_pointer(out), i, kFloat32), 2 * (1 + i % 4)) << i;
}

class PluginTest : public RegistryTest {
 protected:
  PluginTest() {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_ / "late");
  }
  ~PluginTest() override { std::filesystem::remove_all(folder_); }

  /// A module path that no other test uses ("late.<test><number>"): a library once opened is never closed.
  [[nodiscard]] std::string late_module() const { return "late." + name_; }
  /// Puts `bytes` where `late_module` is looked for.
  void write_late(const std::string& bytes) const {
    std::filesystem::remove(late_file());
    std::ofstream(late_file(), std::ios::binary) << bytes;
  }
  /// Puts the good plug-in there.
  void install_late() const {
    std::filesystem::remove(late_file());
    std::filesystem::copy_file(ABI_ZOO "/zoo/good.so", late_file());
  }

  [[nodiscard]] std::filesystem::path late_file() const { return folder_ / "late" / (name_ + ".so"); }

  /// The ImportError of `class_path`; other backends still give right numbers after it.
  static std::string import_error(const std::string& class_path) {
    const std::string text = error_text<ImportError>([&] { return resolve_class_path(class_path); });
    SCOPED_TRACE("after the failure of " + class_path);
    expect_doubles(*resolve_class_path("zoo.good.Doubler"));
    return text;
  }

 private:
  const std::string name_ = unused(::testing::UnitTest::GetInstance()->current_test_info()->name());
  const std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("ditattn-abi-" + name_ + "-" + std::to_string(::getpid()));
  const ScopedEnvironment path_{"DITATTN_PLUGIN_PATH",
                                (ABI_FIRST ":" ABI_SECOND ":" ABI_ZOO ":" + folder_.string()).c_str()};
};

}  // namespace ditattn::testing
