#include "registry/plugin_file.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <link.h>
#include <tvm/ffi/extra/module.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

#include "core/fork_locks.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/plugin.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;
using tvm::ffi::Any;
using tvm::ffi::Module;
using tvm::ffi::String;

constexpr const char* kExport = "ditattn_backend";

struct OpenFiles {
  std::mutex mutex;
  std::map<std::string, Module> modules;  // by file
};

OpenFiles& open_files() {
  static OpenFiles& instance = *new OpenFiles;  // never destroyed: plug-ins' code may run until the process ends
  [[maybe_unused]] static const bool held = hold_over_fork(instance.mutex);
  return instance;
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
  for (unsigned i = 0; i < header.e_phnum; ++i) {
    ElfW(Phdr) segment{};
    if (!stream.read(reinterpret_cast<char*>(&segment), sizeof segment)) return true;
    if (segment.p_type == PT_LOAD && (segment.p_offset > size || segment.p_filesz > size - segment.p_offset))
      return true;
  }
  return false;
}

// Opened by us first, eagerly, locally and for ever: tvm-ffi's own loader is lazy and closes. Threads that meet here
// both open it, and the first one's module is kept.
Module open_module(const fs::path& file) {
  {
    std::lock_guard lock(open_files().mutex);
    const auto known = open_files().modules.find(file);
    if (known != open_files().modules.end()) return known->second;
  }
  if (is_cut_short(file)) throw ImportError("module failed to load (the file is cut short)");
  if (dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) == nullptr) {
    const char* said = dlerror();
    const std::string reason = said != nullptr ? said : "no reason given";
    if (reason.ends_with(std::strerror(ENOMEM)) || reason == "out of memory") {
      throw MemoryError(fmt::format("{}: module failed to load ({})", file.string(), reason));
    }
    throw ImportError(fmt::format("module failed to load ({})", reason));
  }
  Module module = Module::LoadFromFile(file.string());
  std::lock_guard lock(open_files().mutex);
  return open_files().modules.emplace(file, std::move(module)).first->second;
}

}  // namespace

BackendClass load_plugin_class(const fs::path& file, const std::string& class_name) {
  const std::string origin = file.string();
  return guard(origin, [&] {
    const auto find = open_module(file)->GetFunction(kExport);
    if (!find.has_value()) throw ImportError(fmt::format("module has no export '{}'", kExport));
    const Any table = find.value()(String(class_name));
    if (table == nullptr) throw ImportError(fmt::format("module has no such class '{}'", class_name));
    return backend_from_table(table, origin);
  });
}

}  // namespace ditattn
