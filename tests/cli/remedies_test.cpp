// From errors, as the registry words them, to what to do.

#include "tools/ditattn/remedies.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tools/ditattn/libraries.hpp"

namespace ditattn::cli {
namespace {

constexpr const char* kClassPath = "acme.attention.FastBackend";
constexpr const char* kFile = "/plugins/acme/attention.so";
constexpr const char* kNotBuilt = "not built: ditattn was configured without DITATTN_CUDA";

// A failed look-up's text: first an installed directory that says `installed`, then a plug-in directory that says
// `why`.
std::string lookup_error(const std::string& why, const std::string& installed = "no such file") {
  return "Cannot import 'acme.attention.FastBackend': " + why +
         ". Looked in:\n  - classes registered in this process: none of this path\n  - "
         "/lib/ditattn/backends/acme/attention.so: " +
         installed + "\n  - " + kFile + ": " + why;
}

std::string remedy(const std::string& reason) {
  return remedy_for({.member = "FAST", .class_path = kClassPath, .reason = reason});
}

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in: " << text;
}

TEST(Remedies, NotRegistered) {
  const std::string text = remedy_for({.member = "CUSTOM",
                                       .class_path = "",
                                       .reason = "Backend CUSTOM must be registered before use. Use "
                                                 "register_diffusion_backend(...)"});
  expect_contains(text, "register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM, 'your.module.YourClass')");
}

TEST(Remedies, BadClassPath) {
  expect_contains(remedy("Class path 'x' has no dot. Expected 'package.module.Class'."), "package.module.Class");
}

TEST(Remedies, NotBuilt) {
  expect_contains(remedy(lookup_error("no such file", kNotBuilt)), "Build ditattn with its GPU back ends: make cuda.");
  expect_contains(remedy(lookup_error("no such file", "not built: x.h was not found")),
                  "Provide what the reason names");
}

// What the user put there and is broken goes before what this build lacks.
TEST(Remedies, BrokenFileBeforeNotBuilt) {
  const std::string broken = "module failed to load (" + std::string(kFile) + ": invalid ELF header)";
  expect_contains(remedy(lookup_error(broken, kNotBuilt)), "Replace /plugins/acme/attention.so");
}

TEST(Remedies, NamesTheFileOfEachFault) {
  const std::string file(kFile);
  const std::pair<std::string, std::string> faults[] = {
      {"module failed to load (" + file + ": file too short)", "Replace " + file},
      {"module failed to load (" + file + ": wrong ELF class: ELFCLASS32)", "Replace " + file},
      {"module failed to load (the file is cut short)", "Copy " + file + " again"},
      {"module failed to load (" + file + ": undefined symbol: f)", "Build " + file + " again with this version"},
      {"module failed to load (/lib/libc.so.6: version `GLIBC_2.99' not found (required by " + file + "))",
       "Build " + file + " again on this machine"},
      {"module failed to load (something new)", "Correct or remove " + file},
      {file + ": it was built for interface version 9, this library has version 1. Rebuild it.", "Build " + file},
      {"module has no export 'ditattn_backend'", "Export the classes of " + file},
      {file + ": ditattn_backend did not return a table of functions", "returns in " + file},
      {"not a regular file", "Make " + file + " a regular file"},
      {"cannot be read (Permission denied)", "Make " + file + " a regular file that this user may read"},
  };
  for (const auto& [why, expected] : faults) expect_contains(remedy(lookup_error(why)), expected);
}

TEST(Remedies, ClassMissingInItsModule) {
  expect_contains(remedy(lookup_error("module has no such class 'FastBackend'")), "add 'FastBackend' to it");
}

TEST(Remedies, MissingLibrary) {
  const std::string tail = ": cannot open shared object file: No such file or directory)";
  const std::string known = remedy(lookup_error("module failed to load (libcudnn_graph.so.9" + tail));
  expect_contains(known, "/plugins/acme/attention.so needs libcudnn_graph.so.9, which was not found. It is cuDNN's");
  expect_contains(known, library_of("libcudnn.so.9")->install);
  const std::string unknown = remedy(lookup_error("module failed to load (libnobody.so.1" + tail));
  expect_contains(unknown, "needs libnobody.so.1");
  expect_contains(unknown, "Install the package that has it");
}

TEST(Remedies, UnreadableLibrary) {
  const std::string why = "module failed to load (libx.so.1: cannot open shared object file: Permission denied)";
  expect_contains(remedy(lookup_error(why)), "Let this user read libx.so.1");
}

TEST(Remedies, BadLevel) {
  expect_contains(remedy(lookup_error("DITATTN_CPU_LEVEL='x' is not a level this CPU has: sse2 up to avx2.")),
                  "Unset DITATTN_CPU_LEVEL");
}

TEST(Remedies, NowhereToBeFound) {
  expect_contains(remedy(lookup_error("no such file")), "Put the module's file, acme/attention.so,");
  const std::string relative = "\n  - DITATTN_PLUGIN_PATH entry 'here': ignored, because it is not absolute";
  expect_contains(remedy(lookup_error("no such file") + relative), "absolute directories");
}

// A reason of its own: from a plug-in that is there, or from the file that tells why one was not built.
TEST(Remedies, OwnReasons) {
  const std::filesystem::path folder =
      std::filesystem::path(testing::TempDir()) / ("remedies." + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  const std::string file = folder / "attention.so";
  const std::string reason = "Cannot import 'acme.attention.FastBackend': odd. Looked in:\n  - " + file + ": odd";
  expect_contains(remedy(reason), "build ditattn again");
  std::ofstream(file) << "there";
  expect_contains(remedy(reason), "Correct or remove " + file);
  std::filesystem::remove_all(folder);
}

TEST(Remedies, LoadedButRefusing) {
  expect_contains(remedy("FAST needs a CUDA device; none was found."), "NVIDIA GPU");
  expect_contains(remedy("FAST needs a full moon."), "Do what the reason says");
}

TEST(Libraries, AreKnownByTheirNames) {
  EXPECT_STREQ(library_of("libcuda.so.1")->name, "NVIDIA driver");
  EXPECT_STREQ(library_of("libcudart.so.12")->name, "CUDA runtime");
  EXPECT_STREQ(library_of("libtorch_cpu.so")->name, "LibTorch");
  EXPECT_EQ(library_of("libcudax.so"), nullptr);
  EXPECT_EQ(library_of("libnobody.so.1"), nullptr);
}

TEST(Libraries, TheFirstThatLoadsCounts) {
  const Probe found = probe_library({"libnobody.so.1", "libc.so.6"});
  EXPECT_TRUE(found.file.ends_with("libc.so.6")) << found.file;
  EXPECT_EQ(found.reason, "");
  const Probe missing = probe_library({"libnobody.so.1", "libnobody.so"});
  EXPECT_EQ(missing.file, "");
  expect_contains(missing.reason, "libnobody.so.1: cannot open shared object file");
  expect_contains(missing.reason, "; libnobody.so: cannot open");
}

}  // namespace
}  // namespace ditattn::cli
