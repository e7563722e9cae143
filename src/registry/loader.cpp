// From a class path to a class: classes registered in the process, linked modules, plug-in files, the host's importer.

#include "registry/loader.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <map>
#include <mutex>

#include "core/fork_locks.hpp"
#include "core/interrupt.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "ditattn/plugin.hpp"
#include "ditattn/registry.hpp"
#include "ditattn/version.hpp"
#include "registry/class_path.hpp"
#include "registry/enum.hpp"
#include "registry/plugin_file.hpp"
#include "registry/search_path.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;

struct Importer {
  std::string name;
  ClassImporter import;
};

// Everything known about class paths. Look-ups of loaded classes are cached by the members (enum.cpp). The lock is
// never held while others' code runs: initialisers, Python's import system and the dynamic linker have locks of their
// own, and may come back here.
struct State {
  std::mutex mutex;
  std::uint64_t changes = 0;  // counts registrations; tells whether what was found meanwhile is still wanted
  std::map<std::string, BackendClass> registered;
  std::map<std::string, FindBackend> linked;
  Importer importer;
  std::map<std::string, BackendClass> resolved;
  std::map<std::string, std::string> failed;  // texts of ImportErrors
};

State& state() {
  static State& instance = *new State;  // never destroyed: plug-ins' code may run until the process ends
  [[maybe_unused]] static const bool held = hold_over_fork(instance.mutex);
  return instance;
}

// Forgets what a changed registration may have changed. The caller holds the lock.
template <class IsAffected>
void forget(const IsAffected& is_affected) {
  ++state().changes;
  state().failed.clear();
  std::erase_if(state().resolved, [&](const auto& entry) { return is_affected(entry.first); });
}

// One search for one class: the places tried in order, and why each failed.
class Search {
 public:
  explicit Search(const std::string& text) : text_(text), path_(ClassPath::parse(text)) {}

  BackendClass run(const Importer& importer) {
    BackendClass backend = in_files();
    if (!backend && importer.import && !is_left_out_) backend = in_host(importer);
    if (!backend) throw ImportError(failure());
    for (const std::string& other : broken_) log(LogLevel::warning, "Skipped a broken plug-in: " + other);
    return backend;
  }

 private:
  // The first directory that gives the class wins. What was broken on the way is warned about, what was missing is not.
  BackendClass in_files() {
    for (const std::string& directory : plugin_search_path()) {
      const fs::path file = fs::path(directory) / path_.relative_file();
      std::error_code error;
      const fs::file_status status = fs::status(file, error);
      if (status.type() == fs::file_type::not_found) {
        note_missing(file);
        continue;
      }
      try {
        if (error) throw ImportError(fmt::format("cannot be read ({})", error.message()));
        if (!fs::is_regular_file(status)) throw ImportError("not a regular file");
        if (const std::string reason = reason_not_loaded(directory, file); !reason.empty()) throw ImportError(reason);
        return load_plugin_class(file, path_.class_name);
      } catch (const MemoryError&) {
        throw;  // says nothing of the file, and is not remembered
      } catch (const Error& failure) {
        reason_ = failure.message();
      }
      tried_.push_back(fmt::format("{}: {}", file.string(), reason_));
      broken_.push_back(tried_.back());
    }
    for (const auto& [entry, reason] : ignored_search_path_entries()) {
      tried_.push_back(fmt::format("DITATTN_PLUGIN_PATH entry '{}': ignored, because {}", entry, reason));
    }
    return nullptr;
  }

  void note_missing(const fs::path& file) {
    const std::string not_built = reason_not_built(file);
    if (!not_built.empty()) {  // the module is this build's own: another of its name must not stand in for it
      reason_ = not_built;
      is_left_out_ = true;
    }
    tried_.push_back(fmt::format("{}: {}", file.string(), not_built.empty() ? "no such file" : not_built));
  }

  BackendClass in_host(const Importer& importer) {
    try {
      if (BackendClass backend = guard(importer.name, [&] { return importer.import(text_); })) return backend;
      tried_.push_back(importer.name + ": no such module");
    } catch (const MemoryError&) {
      throw;
    } catch (const Error& error) {
      if (is_interrupt(error)) throw;
      reason_ = error.message();
      tried_.push_back(fmt::format("{}: {}", importer.name, reason_));
    }
    return nullptr;
  }

  [[nodiscard]] std::string failure() const {
    return fmt::format(
        "Cannot import '{}': {}. Looked in:\n  - classes registered in this process: none of this path\n  - {}", text_,
        reason_, fmt::join(tried_, "\n  - "));
  }

  const std::string& text_;
  ClassPath path_;
  std::vector<std::string> tried_;
  std::vector<std::string> broken_;
  std::string reason_ = "no such module";
  bool is_left_out_ = false;
};

BackendClass find_in_linked_module(const std::string& text, const ClassPath& path, FindBackend find) {
  const auto fail = [&](const std::string& why) {
    return ImportError(
        fmt::format("Cannot import '{}': module '{}', linked into this process, {}.", text, path.module, why));
  };
  try {
    const tvm::ffi::Any table =
        guard(path.module, [&] { return backend_table(find, path.class_name, DITATTN_INTERFACE_VERSION); });
    if (table != nullptr) return backend_from_table(table, path.module);
  } catch (const MemoryError&) {
    throw;
  } catch (const Error& error) {
    throw fail(fmt::format("failed to load ({})", error.message()));
  }
  throw fail(fmt::format("has no such class '{}'", path.class_name));
}

// Where to look, copied under the lock.
struct Places {
  std::uint64_t changes = 0;
  BackendClass known;  // resolved before, or registered
  FindBackend linked = nullptr;
  Importer importer;
};

Places places_for(const std::string& text) {
  std::lock_guard lock(state().mutex);
  const auto in = [&](const auto& map, const std::string& key) {
    const auto found = map.find(key);
    return found == map.end() ? typename std::decay_t<decltype(map)>::mapped_type{} : found->second;
  };
  if (const std::string failure = in(state().failed, text); !failure.empty()) throw ImportError(failure);
  Places places;
  places.changes = state().changes;
  places.known = in(state().resolved, text);
  if (!places.known) places.known = in(state().registered, text);
  if (places.known) return places;
  places.linked = in(state().linked, ClassPath::parse(text).module);
  places.importer = state().importer;
  return places;
}

// Whether a registration made meanwhile goes before what was found. The caller holds the lock.
bool is_superseded(const std::string& text, const Places& places) {
  const auto linked = state().linked.find(ClassPath::parse(text).module);
  return state().registered.contains(text) || (linked != state().linked.end() && linked->second != places.linked);
}

}  // namespace

BackendClass resolve_class_path(const std::string& class_path) {
  for (;;) {
    const Places places = places_for(class_path);
    if (places.known) return places.known;
    try {
      BackendClass backend = places.linked != nullptr
                                 ? find_in_linked_module(class_path, ClassPath::parse(class_path), places.linked)
                                 : Search(class_path).run(places.importer);
      std::lock_guard lock(state().mutex);
      if (state().changes != places.changes && is_superseded(class_path, places)) continue;
      return state().resolved.try_emplace(class_path, std::move(backend)).first->second;
    } catch (const ImportError& error) {
      std::lock_guard lock(state().mutex);
      if (state().changes == places.changes) state().failed.insert_or_assign(class_path, error.message());
      throw;
    }
  }
}

void forget_failed_lookups() {
  std::lock_guard lock(state().mutex);
  forget([](const std::string&) { return false; });
}

void link_backend_module(const std::string& module_path, FindBackend find) {
  {
    std::lock_guard lock(state().mutex);
    state().linked.insert_or_assign(module_path, find);
    forget([&](const std::string& path) { return path.starts_with(module_path + "."); });
  }
  forget_resolved_members();
}

void register_backend_class(const std::string& class_path, BackendClass backend) {
  if (!backend) throw ValueError(fmt::format("Cannot register a null class as '{}'.", class_path));
  {
    std::lock_guard lock(state().mutex);
    state().registered.insert_or_assign(class_path, std::move(backend));
    forget([&](const std::string& path) { return path == class_path; });
  }
  forget_resolved_members();
}

void set_class_importer(std::string name, ClassImporter importer) {
  std::lock_guard lock(state().mutex);
  state().importer = {.name = std::move(name), .import = std::move(importer)};
  forget([](const std::string&) { return false; });
}

}  // namespace ditattn
