// From a class path to a class: classes registered in the process, linked modules, then plug-in files.

#include "registry/loader.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <link.h>
#include <tvm/ffi/extra/module.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>

#include "core/environment.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "ditattn/plugin.hpp"
#include "ditattn/registry.hpp"
#include "ditattn/version.hpp"
#include "registry/class_path.hpp"
#include "registry/enum.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;
using tvm::ffi::Any;
using tvm::ffi::String;

constexpr const char* kExport = "ditattn_backend";

// Relative to the library's own directory; cmake/targets.cmake installs there.
constexpr const char* kInstalledBackends = "ditattn/backends";

// Everything known about class paths. One lock: look-ups of loaded classes are cached by the members (enum.cpp).
// Recursive, because a module's initialisers may register classes while it is being loaded.
struct State {
  std::recursive_mutex mutex;
  std::map<std::string, BackendClass> registered;
  std::map<std::string, FindBackend> linked;
  std::map<std::string, tvm::ffi::Module> modules;  // by file; kept for ever
  std::map<std::string, BackendClass> resolved;
  std::map<std::string, std::string> failed;  // texts of ImportErrors
};

State& state() {
  static State& instance = *new State;  // never destroyed: plug-ins' code may run until the process ends
  return instance;
}

std::string library_directory() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&library_directory), &info) == 0) return {};
  std::error_code error;
  const fs::path file = fs::canonical(info.dli_fname, error);
  return error ? std::string() : file.parent_path().string();
}

std::vector<std::string> split_plugin_path() {
  std::vector<std::string> entries;
  std::istringstream stream(environment(Env::DITATTN_PLUGIN_PATH).value_or(""));
  for (std::string entry; std::getline(stream, entry, ':');) {
    if (!entry.empty()) entries.push_back(entry);
  }
  return entries;
}

// Where a backend that was not built left its reason (cmake/targets.cmake); empty if there is none.
std::string reason_not_built(fs::path file) {
  std::ifstream stream(file.replace_extension(".not_built"));
  std::string reason;
  std::getline(stream, reason);
  return reason;
}

// Whether a library's segments reach past the end of its file, as in a copy cut short: dlopen maps such a file and the
// process dies of SIGBUS. What is no library of this machine is left to dlopen, which says so.
bool is_cut_short(const fs::path& file) {
  constexpr unsigned char own_class = sizeof(void*) == 8 ? ELFCLASS64 : ELFCLASS32;
  std::ifstream stream(file, std::ios::binary);
  ElfW(Ehdr) header{};
  if (!stream.read(reinterpret_cast<char*>(&header), sizeof header)) return false;
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != own_class) return false;
  std::error_code error;
  const std::uintmax_t size = fs::file_size(file, error);
  stream.seekg(static_cast<std::streamoff>(header.e_phoff));
  for (int i = 0; i < header.e_phnum; ++i) {
    ElfW(Phdr) segment{};
    if (!stream.read(reinterpret_cast<char*>(&segment), sizeof segment)) return true;
    if (segment.p_type == PT_LOAD && (segment.p_offset > size || segment.p_filesz > size - segment.p_offset))
      return true;
  }
  return false;
}

// Opened by us first, eagerly, locally and for ever: tvm-ffi's own loader is lazy and closes.
tvm::ffi::Module open_module(const fs::path& file) {
  const auto known = state().modules.find(file);
  if (known != state().modules.end()) return known->second;
  if (is_cut_short(file)) throw ImportError("module failed to load (the file is cut short)");
  if (dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) == nullptr) {
    const char* reason = dlerror();
    throw ImportError(fmt::format("module failed to load ({})", reason != nullptr ? reason : "no reason given"));
  }
  tvm::ffi::Module module = tvm::ffi::Module::LoadFromFile(file.string());
  state().modules.emplace(file, module);
  return module;
}

BackendClass load_from_file(const fs::path& file, const std::string& class_name) {
  const std::string origin = file.string();
  return guard(origin, [&] {
    const auto find = open_module(file)->GetFunction(kExport);
    if (!find.has_value()) throw ImportError(fmt::format("module has no export '{}'", kExport));
    const Any table = find.value()(String(class_name));
    if (table == nullptr) throw ImportError(fmt::format("module has no such class '{}'", class_name));
    return backend_from_table(table, origin);
  });
}

// Looks for the module in every directory; the first that gives the class wins. What was broken on the way is warned
// about, what was missing is not.
BackendClass find_in_files(const std::string& text, const ClassPath& path) {
  std::vector<std::string> tried;
  std::vector<std::string> broken;
  std::string missing_reason = "no such module";
  for (const std::string& directory : plugin_search_path()) {
    const fs::path file = fs::path(directory) / path.relative_file();
    std::error_code error;
    const fs::file_status status = fs::status(file, error);
    std::string reason;
    if (status.type() == fs::file_type::not_found) {
      reason = reason_not_built(file);
      if (!reason.empty()) missing_reason = reason;
      tried.push_back(fmt::format("{}: {}", file.string(), reason.empty() ? "no such file" : reason));
      continue;
    }
    if (error) {
      reason = fmt::format("cannot be read ({})", error.message());
    } else if (!fs::is_regular_file(status)) {
      reason = "not a regular file";
    } else {
      try {
        BackendClass backend = load_from_file(file, path.class_name);
        for (const std::string& other : broken) log(LogLevel::warning, "Skipped a broken plug-in: " + other);
        return backend;
      } catch (const Error& failure) {
        reason = failure.message();
      }
    }
    missing_reason = reason;
    tried.push_back(fmt::format("{}: {}", file.string(), reason));
    broken.push_back(tried.back());
  }
  for (const std::string& entry : split_plugin_path()) {
    if (!fs::path(entry).is_absolute()) {
      tried.push_back(fmt::format("DITATTN_PLUGIN_PATH entry '{}': ignored, because it is not absolute", entry));
    }
  }
  throw ImportError(
      fmt::format("Cannot import '{}': {}. Looked in:\n  - classes registered in this process: none of "
                  "this path\n  - {}",
                  text, missing_reason, fmt::join(tried, "\n  - ")));
}

BackendClass find_class(const std::string& text) {
  const auto registered = state().registered.find(text);
  if (registered != state().registered.end()) return registered->second;
  const ClassPath path = ClassPath::parse(text);
  const auto linked = state().linked.find(path.module);
  if (linked == state().linked.end()) return find_in_files(text, path);
  try {
    const Any table =
        guard(path.module, [&] { return backend_table(linked->second, path.class_name, DITATTN_INTERFACE_VERSION); });
    if (table != nullptr) return backend_from_table(table, path.module);
  } catch (const Error& error) {
    throw ImportError(fmt::format("Cannot import '{}': module '{}', linked into this process, failed to load ({}).",
                                  text, path.module, error.message()));
  }
  throw ImportError(fmt::format("Cannot import '{}': module '{}', linked into this process, has no such class '{}'.",
                                text, path.module, path.class_name));
}

}  // namespace

std::vector<std::string> plugin_search_path() {
  std::vector<std::string> directories;
  const std::string library = library_directory();
  if (!library.empty()) directories.push_back((fs::path(library) / kInstalledBackends).string());
  for (const std::string& entry : split_plugin_path()) {
    if (fs::path(entry).is_absolute()) directories.push_back(entry);
  }
  return directories;
}

BackendClass resolve_class_path(const std::string& class_path) {
  std::lock_guard lock(state().mutex);
  if (const auto known = state().resolved.find(class_path); known != state().resolved.end()) return known->second;
  if (const auto failed = state().failed.find(class_path); failed != state().failed.end()) {
    throw ImportError(failed->second);
  }
  try {
    BackendClass backend = find_class(class_path);
    state().resolved.insert_or_assign(class_path, backend);
    return backend;
  } catch (const ImportError& error) {
    state().failed.insert_or_assign(class_path, error.message());
    throw;
  }
}

void forget_failed_lookups() {
  std::lock_guard lock(state().mutex);
  state().failed.clear();
}

void link_backend_module(const std::string& module_path, FindBackend find) {
  {
    std::lock_guard lock(state().mutex);
    state().linked.insert_or_assign(module_path, find);
    std::erase_if(state().resolved, [&](const auto& entry) { return entry.first.starts_with(module_path + "."); });
    state().failed.clear();
  }
  forget_resolved_members();
}

void register_backend_class(const std::string& class_path, BackendClass backend) {
  if (!backend) throw ValueError(fmt::format("Cannot register a null class as '{}'.", class_path));
  {
    std::lock_guard lock(state().mutex);
    state().registered.insert_or_assign(class_path, std::move(backend));
    state().resolved.erase(class_path);
    state().failed.clear();
  }
  forget_resolved_members();
}

}  // namespace ditattn
