// From an error's text to what to do. Background: a look-up's error lists every place looked in, each with its own
// reason; the remedy is for the place that is most wrong. Rejected: an enumeration of causes carried by the errors,
// which plug-ins in other languages could not fill, and which would make each new message an interface.

#include "tools/ditattn/remedies.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <string_view>
#include <vector>

#include "tools/ditattn/libraries.hpp"

namespace ditattn::cli {
namespace {

// One place of "Looked in:", or an error that names none.
struct Place {
  std::string file;  // empty where it is no file
  std::string why;
};

struct Rule {
  std::string_view pattern;  // in the place's reason
  const char* remedy;        // {member}, {class}, {module_file}, {file}, {library}, {install}
};

constexpr const char* kReplace = "Replace {file} by a shared library built for this machine, or remove it.";
constexpr const char* kReadable = "Make {file} a regular file that this user may read, or remove it.";
constexpr const char* kRebuild = "Build {file} again with this version of ditattn, or remove it.";

// The first rule that fits any place is the one followed, so what is broken stands before what is only missing.
constexpr Rule kRules[] = {
    {"must be registered before use",
     "Register a class of your own: register_diffusion_backend(DiffusionAttentionBackendEnum.{member}, "
     "'your.module.YourClass'). A plug-in's file is then your/module.so in a directory of DITATTN_PLUGIN_PATH "
     "(docs/plugins.md)."},
    {"Class path '",
     "Register a class path of the form 'package.module.Class', of letters, digits and underscores between dots."},
    {"DITATTN_CPU_LEVEL=", "Unset DITATTN_CPU_LEVEL, or set it to a level this CPU has."},
    {"the file is cut short", "Copy {file} again, or build it again: it ends too early."},
    {"invalid ELF header", kReplace},
    {"file too short", kReplace},
    {"wrong ELF class", kReplace},
    {"only ET_DYN and ET_EXEC", kReplace},
    {"cannot open shared object file: Permission denied", "Let this user read {library}, which {file} needs."},
    {"cannot open shared object file", "{file} needs {library}, which was not found. {install}"},
    {"undefined symbol", kRebuild},
    {"' not found (required by", "Build {file} again on this machine: it needs a newer system library."},
    {"it was built for interface version", kRebuild},
    {"did not return a table of functions", "Correct what ditattn_backend returns in {file} (docs/plugins.md)."},
    {"module has no export",
     "Export the classes of {file} with DITATTN_EXPORT_BACKENDS (docs/plugins.md), or remove it."},
    {"has no such class",
     "Register the path of a class that the module has, or add '{class}' to it and build it again."},
    {"Plug-ins are code: ",
     "Change who may write there as the reason says, or copy the plug-ins to a folder of your own."},
    {"not a regular file", kReadable},
    {"cannot be read (", kReadable},
    {"module failed to load", "Correct or remove {file}: the dynamic linker refuses it."},
    {"configured without DITATTN_CUDA", "Build ditattn with its GPU back ends: make cuda."},
    {"CUDA device",
     "Run it on a machine with an NVIDIA GPU and its driver; a container is given both "
     "(docker run --gpus all)."},
    {"ignored, because it is not absolute",
     "Write the entries of DITATTN_PLUGIN_PATH as absolute directories: others are ignored."},
};

constexpr const char* kBrokenItself = "Correct or remove {file}: it loads, and then fails by its own doing.";
constexpr const char* kNotBuilt = "Provide what the reason names, and build ditattn again.";
constexpr const char* kMissing =
    "Put the module's file, {module_file}, into a directory of DITATTN_PLUGIN_PATH, or register another class path.";
constexpr const char* kRefuses = "Do what the reason says: the back end is there, and refuses to run on this machine.";

// A line "  - /dir/a/b.so: why", or "  - somewhere: why".
Place parse_place(std::string_view line) {
  constexpr std::string_view after_file = ".so: ";
  if (const std::size_t end = line.find(after_file); line.starts_with('/') && end != std::string_view::npos) {
    return {.file = std::string(line.substr(0, end + 3)), .why = std::string(line.substr(end + after_file.size()))};
  }
  return {.file = {}, .why = std::string(line)};
}

std::vector<Place> places_of(const std::string& reason) {
  constexpr std::string_view bullet = "\n  - ";
  std::vector<Place> places;
  for (std::size_t at = reason.find(bullet); at != std::string::npos;) {
    const std::size_t next = reason.find(bullet, at + 1);
    const std::size_t begin = at + bullet.size();
    places.push_back(
        parse_place(std::string_view(reason).substr(begin, next == std::string::npos ? next : next - begin)));
    at = next;
  }
  if (places.empty()) places.push_back({.file = {}, .why = reason});
  return places;
}

// "libx.so.1" in "…(libx.so.1: cannot open shared object file: …)".
std::string missing_library(std::string_view why) {
  const std::size_t end = why.find(": cannot open shared object file");
  if (end == std::string_view::npos) return {};
  const std::size_t before = why.find_last_of(" (", end);
  const std::size_t begin = before == std::string_view::npos ? 0 : before + 1;
  return std::string(why.substr(begin, end - begin));
}

std::string how_to_install(const std::string& soname) {
  if (const OptionalLibrary* known = library_of(soname))
    return fmt::format("It is {}'s: {}.", known->name, known->install);
  return "Install the package that has it, or add its directory to LD_LIBRARY_PATH.";
}

std::string fill_in(const char* remedy, const Unavailable& member, const Place& place) {
  const std::size_t last_dot = std::min(member.class_path.rfind('.'), member.class_path.size());
  std::string module_file = member.class_path.substr(0, last_dot) + ".so";
  std::ranges::replace(module_file.begin(), module_file.end() - 3, '.', '/');
  const std::string library = missing_library(place.why);
  return fmt::format(fmt::runtime(remedy), fmt::arg("member", member.member),
                     fmt::arg("class", member.class_path.substr(std::min(last_dot + 1, member.class_path.size()))),
                     fmt::arg("module_file", module_file), fmt::arg("file", place.file.empty() ? "it" : place.file),
                     fmt::arg("library", library), fmt::arg("install", how_to_install(library)));
}

// No rule fits: a plug-in that fails by its own doing, or a back end that left its reason where its file would be.
const char* remedy_for_file(const Place& place) {
  std::error_code error;
  return std::filesystem::exists(place.file, error) ? kBrokenItself : kNotBuilt;
}

}  // namespace

std::string remedy_for(const Unavailable& member) {
  const std::vector<Place> places = places_of(member.reason);
  for (const Rule& rule : kRules) {
    const auto fits = [&](const Place& place) { return place.why.find(rule.pattern) != std::string::npos; };
    if (const auto place = std::ranges::find_if(places, fits); place != places.end()) {
      return fill_in(rule.remedy, member, *place);
    }
  }
  const auto tells = [](const Place& place) { return !place.file.empty() && place.why != "no such file"; };
  if (const auto place = std::ranges::find_if(places, tells); place != places.end()) {
    return fill_in(remedy_for_file(*place), member, *place);
  }
  const bool looked = member.reason.find("Looked in:") != std::string::npos;
  return fill_in(looked ? kMissing : kRefuses, member, places.front());
}

}  // namespace ditattn::cli
