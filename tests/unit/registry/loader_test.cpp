// Where class paths are looked for, and what the errors say. Plug-in files themselves: tests/abi.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "ditattn/plugin.hpp"
#include "ditattn/registry.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using testing::error_text;
using testing::expect_contains;
using testing::RegistryTest;
using testing::ScopedEnvironment;
using testing::ToyBackend;
using testing::unused;

class SearchPath : public RegistryTest {};
class Resolve : public RegistryTest {};
class LinkedModule : public RegistryTest {};

TEST_F(SearchPath, InstalledBackendsComeFirst) {
  const ScopedEnvironment variable("DITATTN_PLUGIN_PATH", "/opt/a:/opt/b");
  const std::vector<std::string> path = plugin_search_path();
  ASSERT_EQ(path.size(), 3U);
  EXPECT_TRUE(std::filesystem::path(path[0]).is_absolute()) << path[0];
  EXPECT_EQ(path[0].substr(path[0].size() - 17), "/ditattn/backends");
  EXPECT_EQ(path[1], "/opt/a");
  EXPECT_EQ(path[2], "/opt/b");
}

TEST_F(SearchPath, LeavesOutRelativeAndEmptyEntries) {
  const ScopedEnvironment variable("DITATTN_PLUGIN_PATH", "::relative:./b:/opt/c:~/d:");
  const std::vector<std::string> path = plugin_search_path();
  ASSERT_EQ(path.size(), 2U);
  EXPECT_EQ(path[1], "/opt/c");
}

TEST_F(SearchPath, IsTheInstalledOneWithoutTheVariable) {
  const ScopedEnvironment variable("DITATTN_PLUGIN_PATH", nullptr);
  EXPECT_EQ(plugin_search_path().size(), 1U);
}

TEST_F(Resolve, RegisteredClassesComeBeforeFilesAndAreKeyedVerbatim) {
  const auto backend = std::make_shared<ToyBackend>();
  for (const char* path : {"loader_test.a.B", "Plain", "f.<locals>.B", "with space.and/slash"}) {
    register_backend_class(path, backend);
    EXPECT_EQ(resolve_class_path(path), backend) << path;
  }
}

TEST_F(Resolve, NoSuchModuleNamesThePathAndEveryPlace) {
  const ScopedEnvironment variable("DITATTN_PLUGIN_PATH", "/opt/loader-test-a:/opt/loader-test-b:relative/dir");
  const std::string installed = plugin_search_path().at(0);
  EXPECT_EQ(error_text<ImportError>([] { return resolve_class_path("loader_test.places.Backend"); }),
            "Cannot import 'loader_test.places.Backend': no such module. Looked in:\n"
            "  - classes registered in this process: none of this path\n"
            "  - " +
                installed +
                "/loader_test/places.so: no such file\n"
                "  - /opt/loader-test-a/loader_test/places.so: no such file\n"
                "  - /opt/loader-test-b/loader_test/places.so: no such file\n"
                "  - DITATTN_PLUGIN_PATH entry 'relative/dir': ignored, because it is not absolute");
}

// A build leaves the reason in place of a plug-in's file; it is what the error says first.
TEST_F(Resolve, WhatWasNotBuiltTellsTheBuildsReason) {
  const std::filesystem::path folder =
      std::filesystem::path(::testing::TempDir()) / ("loader_test." + std::to_string(::getpid()));
  std::filesystem::create_directories(folder / "loader_test");
  std::ofstream(folder / "loader_test/unbuilt.not_built") << "not built: there was no compiler for it\nmore\n";
  const ScopedEnvironment variable("DITATTN_PLUGIN_PATH", folder.c_str());
  EXPECT_EQ(error_text<ImportError>([] { return resolve_class_path("loader_test.unbuilt.Backend"); }),
            "Cannot import 'loader_test.unbuilt.Backend': not built: there was no compiler for it. Looked in:\n"
            "  - classes registered in this process: none of this path\n"
            "  - " +
                plugin_search_path().at(0) + "/loader_test/unbuilt.so: no such file\n  - " + folder.string() +
                "/loader_test/unbuilt.so: not built: there was no compiler for it");
  std::filesystem::remove_all(folder);
}

TEST_F(Resolve, MalformedPathsTouchNoFile) {
  error_text<ClassPathError>([] { return resolve_class_path("../../../../etc/passwd.C"); });
  error_text<ClassPathError>([] { return resolve_class_path("NoDot"); });
}

TEST_F(Resolve, FailureIsForgottenWhenTheClassIsRegistered) {
  const std::string path = unused("loader_test.late.Backend");
  error_text<ImportError>([&] { return resolve_class_path(path); });
  register_backend_class(path, std::make_shared<ToyBackend>("LATE"));
  EXPECT_EQ(resolve_class_path(path)->get_name(), "LATE");
}

BackendClass find_linked(std::string_view name) {
  if (name == "Toy") return std::make_shared<ToyBackend>("LINKED", 2);
  if (name == "ValueThrower") throw ValueError("find does not like it");
  if (name == "IntThrower") throw 42;
  return nullptr;
}

TEST_F(LinkedModule, IsFoundByModulePathAndClassName) {
  link_backend_module("loader_test.linked", &find_linked);
  const BackendClass backend = resolve_class_path("loader_test.linked.Toy");
  EXPECT_EQ(backend->get_name(), "LINKED");
  EXPECT_EQ(testing::toy_answer(*backend), 6);
  EXPECT_EQ(resolve_class_path("loader_test.linked.Toy"), backend);
}

TEST_F(LinkedModule, FailureBeforeLinkingIsForgotten) {
  const std::string module = unused("loader_test.linked_late");
  error_text<ImportError>([&] { return resolve_class_path(module + ".Toy"); });
  link_backend_module(module, &find_linked);
  EXPECT_EQ(resolve_class_path(module + ".Toy")->get_name(), "LINKED");
}

TEST_F(LinkedModule, HasNoSuchClass) {
  link_backend_module("loader_test.linked", &find_linked);
  EXPECT_EQ(error_text<ImportError>([] { return resolve_class_path("loader_test.linked.Other"); }),
            "Cannot import 'loader_test.linked.Other': module 'loader_test.linked', linked into this process, has no "
            "such class 'Other'.");
}

TEST_F(LinkedModule, WhateverItThrowsIsAnImportError) {
  link_backend_module("loader_test.linked", &find_linked);
  EXPECT_EQ(error_text<ImportError>([] { return resolve_class_path("loader_test.linked.ValueThrower"); }),
            "Cannot import 'loader_test.linked.ValueThrower': module 'loader_test.linked', linked into this process, "
            "failed to load (find does not like it).");
  expect_contains(error_text<ImportError>([] { return resolve_class_path("loader_test.linked.IntThrower"); }),
                  {"failed to load (loader_test.linked threw something that is not a std::exception)"});
}

// What stands in for Python's importlib.
class Importer : public RegistryTest {
 protected:
  void TearDown() override {
    set_class_importer("", nullptr);
    RegistryTest::TearDown();
  }
};

TEST_F(Importer, IsAskedAfterRegisteredClasses) {
  std::vector<std::string> asked;
  set_class_importer("host", [&](const std::string& path) -> BackendClass {
    asked.push_back(path);
    return std::make_shared<ToyBackend>("IMPORTED");
  });
  register_backend_class("loader_test.host.Registered", std::make_shared<ToyBackend>("REGISTERED"));
  EXPECT_EQ(resolve_class_path("loader_test.host.Registered")->get_name(), "REGISTERED");
  const std::string path = unused("loader_test.host.Class");
  const BackendClass imported = resolve_class_path(path);
  EXPECT_EQ(imported->get_name(), "IMPORTED");
  EXPECT_EQ(resolve_class_path(path), imported) << "asked once";
  EXPECT_EQ(asked, (std::vector<std::string>{path}));
}

TEST_F(Importer, ItsReasonEndsTheListAndLeadsTheMessage) {
  set_class_importer("host", [](const std::string&) -> BackendClass { throw ImportError("module has no such class"); });
  expect_contains(error_text<ImportError>([] { return resolve_class_path("loader_test.host_says.No"); }),
                  {"Cannot import 'loader_test.host_says.No': module has no such class. Looked in:",
                   "/loader_test/host_says.so: no such file\n  - host: module has no such class"});
  set_class_importer("host", [](const std::string&) -> BackendClass { return nullptr; });
  expect_contains(
      error_text<ImportError>([] { return resolve_class_path("loader_test.host_says.No"); }),
      {"Cannot import 'loader_test.host_says.No': no such module. Looked in:", "\n  - host: no such module"});
}

TEST_F(Importer, MalformedPathsDoNotReachIt) {
  set_class_importer("host", [](const std::string&) -> BackendClass { return std::make_shared<ToyBackend>(); });
  error_text<ClassPathError>([] { return resolve_class_path("os.system('x').Class"); });
}

// An import may wait for another thread that looks up classes itself, as Python's import lock makes it.
TEST_F(Importer, HoldsNoLockWhileItRuns) {
  register_backend_class("loader_test.host.Other", std::make_shared<ToyBackend>("OTHER"));
  set_class_importer("host", [](const std::string&) -> BackendClass {
    BackendClass other;
    std::thread([&] { other = resolve_class_path("loader_test.host.Other"); }).join();
    std::thread([&] { register_backend_class("loader_test.host.Another", other); }).join();
    return other;
  });
  EXPECT_EQ(resolve_class_path("loader_test.host.Waits")->get_name(), "OTHER");
}

// A class registered by its own module, as decorators do, is the one that is found.
TEST_F(Importer, ClassRegisteredMeanwhileGoesFirst) {
  set_class_importer("host", [](const std::string& path) -> BackendClass {
    register_backend_class(path, std::make_shared<ToyBackend>("REGISTERED"));
    return std::make_shared<ToyBackend>("IMPORTED");
  });
  EXPECT_EQ(resolve_class_path("loader_test.host.Decorated")->get_name(), "REGISTERED");
}

}  // namespace
}  // namespace ditattn
