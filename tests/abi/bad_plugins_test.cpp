// A zoo of bad plug-ins. Each gives an ImportError of its own that names the file, and leaves the rest whole.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "ditattn/registry.hpp"
#include "ditattn/version.hpp"
#include "registry/table_backend.hpp"
#include "tests/abi/plugin_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
namespace fs = std::filesystem;

class BadPlugin : public testing::PluginTest {
 protected:
  // The error names class path, file and `reason`, in the summary and in the list of places.
  static void expect_import_error(const std::string& class_path, const std::string& file, const std::string& reason) {
    const std::string text = import_error(class_path);
    expect_contains(
        text, {"Cannot import '" + class_path + "': ", "Looked in:\n", "\n  - " ABI_ZOO "/" + file + ": " + reason});
    EXPECT_EQ(text.find("no such module"), std::string::npos) << "the module is there: " << text;
  }
};

TEST_F(BadPlugin, WrongClassName) {
  expect_import_error("zoo.good.Nobody", "zoo/good.so", "module has no such class 'Nobody'");
}

TEST_F(BadPlugin, NoSuchModule) {
  const std::string text = import_error("zoo.nothing.Backend");
  expect_contains(text, {"Cannot import 'zoo.nothing.Backend': no such module.",
                         ABI_FIRST "/zoo/nothing.so: no such file", ABI_SECOND "/zoo/nothing.so: no such file",
                         ABI_ZOO "/zoo/nothing.so: no such file", "ditattn/backends/zoo/nothing.so: no such file"});
}

TEST_F(BadPlugin, ModulePathThroughAFile) {
  expect_contains(import_error("zoo.good.inner.Backend"), {"no such module"});
  expect_contains(import_error("zoo.garbage.Backend.Backend"), {"no such module"});
}

TEST_F(BadPlugin, NoExport) {
  expect_import_error("zoo.no_export.Backend", "zoo/no_export.so", "module has no export 'ditattn_backend'");
}

TEST_F(BadPlugin, WrongInterfaceVersion) {
  expect_import_error("zoo.wrong_version.Doubler", "zoo/wrong_version.so",
                      ABI_ZOO "/zoo/wrong_version.so: it was built for interface version " +
                          std::to_string(DITATTN_INTERFACE_VERSION + 1) + ", this library has version " +
                          std::to_string(DITATTN_INTERFACE_VERSION) + ". Rebuild it.");
}

TEST_F(BadPlugin, TableWithoutItsVersion) {
  expect_contains(import_error("zoo.bad_tables.Without_interface_version"), {"built for interface version (none)"});
}

TEST_F(BadPlugin, TableWithoutAFunction) {
  for (const char* function : kTableFunctions) {
    expect_contains(import_error("zoo.bad_tables.Without_" + std::string(function)),
                    {"zoo/bad_tables.so: its table has no function '" + std::string(function) + "'"});
  }
}

TEST_F(BadPlugin, TableThatNamesNoKernelIsTaken) {
  EXPECT_EQ(resolve_class_path("zoo.bad_tables.Without_kernel_name")->kernel_name({}), "");
}

TEST_F(BadPlugin, TableOfWrongTypes) {
  expect_contains(import_error("zoo.bad_tables.TextForFunction"), {"its table has no function 'create'"});
  expect_contains(import_error("zoo.bad_tables.TextForTable"), {"did not return a table of functions"});
  expect_contains(import_error("zoo.bad_tables.NameIsANumber"), {"zoo/bad_tables.so"});
  expect_contains(import_error("zoo.bad_tables.UnknownDtype"), {"Unknown dtype 'float3'"});
}

TEST_F(BadPlugin, CreateThatGivesNoFunctionFailsInMake) {
  const BackendClass backend = resolve_class_path("zoo.bad_tables.CreateGivesText");
  error_text<Error>([&] { return backend->make({}); });
}

TEST_F(BadPlugin, UndefinedSymbolIsFoundAtLoadTime) {
  expect_import_error("zoo.undefined_symbol.Doubler", "zoo/undefined_symbol.so", "module failed to load (");
  expect_contains(import_error("zoo.undefined_symbol.Doubler"), {"undefined symbol", "nobody_defines"});
}

TEST_F(BadPlugin, ItsLibraryIsMissing) {
  expect_import_error("zoo.missing_dependency.Doubler", "zoo/missing_dependency.so", "module failed to load (");
  expect_contains(import_error("zoo.missing_dependency.Doubler"), {"libabi_absent.so", "No such file or directory"});
}

TEST_F(BadPlugin, ThrowsWhileItsClassIsLookedUp) {
  expect_import_error("zoo.throws.ThrowsValueError", "zoo/throws.so", "a value it does not like");
  expect_import_error("zoo.throws.ThrowsRuntimeError", "zoo/throws.so", "its library is too old");
  expect_import_error("zoo.throws.ThrowsInt", "zoo/throws.so", "something that is not a std::exception was thrown");
  EXPECT_EQ(resolve_class_path("zoo.throws.Doubler")->get_name(), "DOUBLER") << "its other classes still work";
}

TEST_F(BadPlugin, NotALibrary) {
  expect_import_error("zoo.garbage.Backend", "zoo/garbage.so", "module failed to load (");
  expect_import_error("zoo.empty.Backend", "zoo/empty.so", "module failed to load (");
}

TEST_F(BadPlugin, Directory) { expect_import_error("zoo.directory.Backend", "zoo/directory.so", "not a regular file"); }

TEST_F(BadPlugin, LoopOfLinks) {
  fs::create_symlink(late_file().filename(), late_file());  // to itself
  expect_contains(import_error(late_module() + ".Doubler"),
                  {late_file().string() + ": cannot be read (Too many levels of symbolic links)"});
  fs::create_directory_symlink("loop", late_file().parent_path() / "loop");
  expect_contains(import_error("late.loop.inner.Doubler"),
                  {"/late/loop/inner.so: cannot be read (Too many levels of symbolic links)"});
}

// While it lives, permissions hold: root, to whom they do not apply, becomes nobody.
class PermissionsHold {
 public:
  PermissionsHold() : is_root_(::geteuid() == 0), holds_(!is_root_ || ::seteuid(kNobody) == 0) {}
  PermissionsHold(const PermissionsHold&) = delete;
  PermissionsHold& operator=(const PermissionsHold&) = delete;
  ~PermissionsHold() {
    if (is_root_ && holds_ && ::seteuid(0) != 0) std::abort();
  }
  explicit operator bool() const { return holds_; }

 private:
  static constexpr uid_t kNobody = 65534;
  bool is_root_;
  bool holds_;
};

// What resolving `class_path` says where permissions hold; empty if they cannot be made to.
std::string text_of_denial(const std::string& class_path) {
  const PermissionsHold permissions;
  return permissions ? error_text<ImportError>([&] { return resolve_class_path(class_path); }) : "";
}

TEST_F(BadPlugin, UnreadableFile) {
  install_late();
  fs::permissions(late_file(), fs::perms::none);
  const std::string text = text_of_denial(late_module() + ".Doubler");
  if (text.empty()) GTEST_SKIP() << "this root may not become another user, so nothing is denied to it";
  expect_contains(text, {late_file().string() + ": module failed to load (", "Permission denied"});
  EXPECT_EQ(import_error(late_module() + ".Doubler"), text) << "remembered";
}

TEST_F(BadPlugin, UnreadableDirectory) {
  install_late();
  const fs::path directory = late_file().parent_path();
  fs::permissions(directory, fs::perms::none);
  const std::string text = text_of_denial(late_module() + ".Doubler");
  const std::string again = text.empty() ? "" : import_error(late_module() + ".Doubler");
  fs::permissions(directory, fs::perms::owner_all);
  if (text.empty()) GTEST_SKIP() << "this root may not become another user, so nothing is denied to it";
  expect_contains(text, {late_file().string() + ": cannot be read (Permission denied)"});
  EXPECT_EQ(again, text) << "remembered";
  Enum::CUSTOM.clear_override();  // forget the failure
  testing::expect_doubles(*resolve_class_path(late_module() + ".Doubler"));
}

// dlopen alone would end the process with SIGBUS: it maps what the headers say, past the end of the file.
TEST_F(BadPlugin, TruncatedLibrary) {
  constexpr std::size_t kSizes[] = {100, 4096, 8192};  // within the program headers, and within the first segments
  std::ifstream whole(ABI_ZOO "/zoo/good.so", std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(whole)), {});
  ASSERT_GT(bytes.size(), 16384U);
  for (std::size_t size : kSizes) {
    write_late(bytes.substr(0, size));
    expect_contains(import_error(late_module() + ".Doubler"),
                    {late_file().string() + ": module failed to load (the file is cut short)"});
    Enum::CUSTOM.clear_override();  // forget the failure
  }
}

TEST_F(BadPlugin, RelativeEntryIsIgnoredAndSaidSo) {
  install_late();
  const fs::path before = fs::current_path();
  fs::current_path(late_file().parent_path().parent_path());
  const testing::ScopedEnvironment variable("DITATTN_PLUGIN_PATH", ".:" ABI_FIRST);
  const std::string text = error_text<ImportError>([&] { return resolve_class_path(late_module() + ".Doubler"); });
  fs::current_path(before);
  expect_contains(text, {"no such module", "DITATTN_PLUGIN_PATH entry '.': ignored, because it is not absolute"});
}

TEST_F(BadPlugin, BrokenCopyGivesWayToAGoodOneWithAWarning) {
  install_late();
  const fs::path root = late_file().parent_path().parent_path();
  const fs::path broken = root / "earlier" / "late" / late_file().filename();
  fs::create_directories(broken.parent_path());
  std::ofstream(broken) << "This is no shared library.\n";
  const testing::ScopedEnvironment path("DITATTN_PLUGIN_PATH",
                                        ((root / "earlier").string() + ":" + root.string()).c_str());
  const testing::LogRecorder log;
  EXPECT_EQ(resolve_class_path(late_module() + ".Doubler")->get_name(), "DOUBLER");
  const std::vector<std::string> warnings = log.of(LogLevel::warning);
  ASSERT_EQ(warnings.size(), 1U);
  expect_contains(warnings[0], {"Skipped a broken plug-in: " + broken.string() + ": module failed to load ("});
}

TEST_F(BadPlugin, FailureIsRememberedUntilARegistrationChanges) {
  register_diffusion_backend(Enum::CUSTOM, late_module() + ".Doubler");
  error_text<ImportError>([] { return Enum::CUSTOM.get_class(); });
  install_late();
  expect_contains(error_text<ImportError>([] { return Enum::CUSTOM.get_class(); }), {"no such module"});
  Enum::SAGE_ATTN.clear_override();  // any change will do
  EXPECT_EQ(Enum::CUSTOM.get_class()->get_name(), "DOUBLER");
}

TEST_F(BadPlugin, FailureIsRetriedAfterRegistering) {
  write_late("broken");
  register_diffusion_backend(Enum::CUSTOM, late_module() + ".Doubler");
  expect_contains(error_text<ImportError>([] { return Enum::CUSTOM.get_class(); }), {"module failed to load"});
  install_late();
  register_diffusion_backend(Enum::CUSTOM, late_module() + ".Doubler");
  EXPECT_EQ(Enum::CUSTOM.get_class()->get_name(), "DOUBLER");
}

}  // namespace
}  // namespace ditattn
