// Plug-in files that change: loaded classes go on whatever becomes of their file, and what could not be loaded can be
// once it is mended.

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>

#include "ditattn/registry.hpp"
#include "tests/abi/plugin_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::expect_contains;
using testing::expect_doubles;
namespace fs = std::filesystem;

class ChangingFile : public testing::PluginTest {
 protected:
  // Looks the class up again, by the same name.
  [[nodiscard]] BackendClass anew() const {
    register_diffusion_backend(Enum::CUSTOM, late_module() + ".Doubler");
    return Enum::CUSTOM.get_class();
  }
  // What stands there is refused for `reason`; a good file in its place is loaded.
  void expect_mendable(const std::string& reason) {
    register_diffusion_backend(Enum::CUSTOM, late_module() + ".Doubler");
    expect_contains(import_error(late_module() + ".Doubler"), {late_file().string() + ": ", reason});
    install_late();
    expect_doubles(*anew());
  }
};

TEST_F(ChangingFile, RemovedWhileInUse) {
  install_late();
  const BackendClass backend = anew();
  const auto attention = backend->make({.num_heads = 2, .head_size = 2});
  fs::remove(late_file());
  testing::forward_doubler(*attention);
  expect_doubles(*backend);
  Enum::CUSTOM.clear_override();
  expect_doubles(*anew());
}

TEST_F(ChangingFile, ReplacedByRenameWhileInUse) {
  install_late();
  const BackendClass backend = anew();
  for (const char* other : {ABI_ZOO "/zoo/good.so", ABI_ZOO "/zoo/no_export.so"}) {
    const fs::path aside = late_file().string() + ".new";
    fs::copy_file(other, aside);
    fs::rename(aside, late_file());
    expect_doubles(*backend);
    expect_doubles(*anew());  // a library once opened stays
  }
}

TEST_F(ChangingFile, ZeroLengthThenMended) {
  write_late("");
  expect_mendable("module failed to load (");
}

TEST_F(ChangingFile, CutShortThenMended) {
  install_late();
  fs::resize_file(late_file(), 8192);  // not half of it: with debug information that may be all that is mapped
  expect_mendable("module failed to load (");
}

TEST_F(ChangingFile, DirectoryThenMended) {
  fs::create_directory(late_file());
  expect_mendable("not a regular file");
}

// Opening it would wait for a writer.
TEST_F(ChangingFile, FifoThenMended) {
  ASSERT_EQ(::mkfifo(late_file().c_str(), 0600), 0);
  expect_mendable("not a regular file");
}

}  // namespace
}  // namespace ditattn
