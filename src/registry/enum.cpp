#include "registry/enum.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <ostream>
#include <shared_mutex>

#include "core/fork_locks.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/registry.hpp"
#include "registry/loader.hpp"

namespace ditattn {
namespace {

struct Member {
  std::string name;
  std::string default_path;
  std::optional<std::string> override_path;
  BackendClass resolved;  // what `path()` led to; null until asked, and again after a registration changes

  [[nodiscard]] const std::string& path() const { return override_path ? *override_path : default_path; }
};

// Readers share the lock: a look-up of a loaded class is one shared lock and one reference count.
struct Table {
  std::shared_mutex mutex;
  std::atomic<std::uint64_t> changes = 0;  // counts registrations; tells whether what was resolved is still wanted
  std::deque<Member> members;
};

constexpr const char* kPrefix = "vllm_omni.diffusion.attention.backends.";

Table& table() {
  // Definition order; the indices are those of the constants in registry.hpp. Never destroyed.
  static Table& instance = *[] {
    auto* made = new Table;
    const auto add = [&](const char* name, const char* path) {
      made->members.push_back(
          {.name = name, .default_path = kPrefix + std::string(path), .override_path = {}, .resolved = {}});
    };
    add("FLASH_ATTN", "flash_attn.FlashAttentionBackend");
    add("TORCH_SDPA", "sdpa.SDPABackend");
    add("SAGE_ATTN", "sage_attn.SageAttentionBackend");
    add("SAGE_ATTN_3", "sage_attn3.SageAttention3Backend");
    add("CUDNN_ATTN", "cudnn_attn.CuDNNAttentionBackend");
    add("FLASHINFER_ATTN", "flashinfer_attn.FlashInferAttentionBackend");
    made->members.push_back({.name = "CUSTOM", .default_path = {}, .override_path = {}, .resolved = {}});
    return made;
  }();
  [[maybe_unused]] static const bool held = hold_over_fork(instance.mutex);
  return instance;
}

// The path to use, or the contract's error where there is none.
const std::string& required_path(const Member& member) {
  if (member.path().empty()) {
    throw NotRegisteredError(
        fmt::format("Backend {0} must be registered before use. Use "
                    "register_diffusion_backend(DiffusionAttentionBackendEnum.{0}, 'your.module.YourClass')",
                    member.name));
  }
  return member.path();
}

}  // namespace

struct MemberAccess {
  static DiffusionAttentionBackendEnum make(std::size_t index) {
    return DiffusionAttentionBackendEnum(static_cast<std::uint32_t>(index));
  }
  static std::uint32_t index(DiffusionAttentionBackendEnum member) { return member.index_; }
};

using Enum = DiffusionAttentionBackendEnum;

Enum Enum::from_name(std::string_view name) {
  std::shared_lock lock(table().mutex);
  std::vector<std::string_view> names;
  for (std::size_t i = 0; i < table().members.size(); ++i) {
    if (table().members[i].name == name) return MemberAccess::make(i);
    names.emplace_back(table().members[i].name);
  }
  throw UnknownBackendError(
      fmt::format("Unknown diffusion attention backend: '{}'. Valid options are: {}", name, fmt::join(names, ", ")));
}

std::vector<Enum> Enum::members() {
  std::shared_lock lock(table().mutex);
  std::vector<Enum> result;
  result.reserve(table().members.size());
  for (std::size_t i = 0; i < table().members.size(); ++i) result.push_back(MemberAccess::make(i));
  return result;
}

Enum Enum::define(std::string_view name, std::string_view default_path) {
  if (name.empty()) throw ValueError("A backend member needs a name.");
  std::unique_lock lock(table().mutex);
  auto& members = table().members;
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (members[i].name != name) continue;
    if (members[i].default_path != default_path) {
      throw ValueError(
          fmt::format("Backend {} is already defined with the path '{}'; it cannot be defined again with "
                      "'{}'. Use register_diffusion_backend to override it.",
                      name, members[i].default_path, default_path));
    }
    return MemberAccess::make(i);
  }
  members.push_back(
      {.name = std::string(name), .default_path = std::string(default_path), .override_path = {}, .resolved = {}});
  return MemberAccess::make(members.size() - 1);
}

std::string Enum::name() const {
  std::shared_lock lock(table().mutex);
  return table().members[index_].name;
}

std::string Enum::value() const {
  std::shared_lock lock(table().mutex);
  return table().members[index_].default_path;
}

std::string Enum::get_path(bool include_classname) const {
  std::shared_lock lock(table().mutex);
  const std::string& path = required_path(table().members[index_]);
  return include_classname ? path : path.substr(0, path.rfind('.'));
}

BackendClass Enum::get_class() const {
  std::string path;
  std::uint64_t changes = 0;
  {
    std::shared_lock lock(table().mutex);
    const Member& member = table().members[index_];
    if (member.resolved) return member.resolved;
    path = required_path(member);
    changes = table().changes;
  }
  // Loading may take long and may come back here: no lock is held.
  BackendClass backend = resolve_class_path(path);
  std::unique_lock lock(table().mutex);
  if (table().changes == changes) table().members[index_].resolved = backend;
  return backend;
}

bool Enum::is_overridden() const {
  std::shared_lock lock(table().mutex);
  return table().members[index_].override_path.has_value();
}

void Enum::clear_override() const {
  {
    std::unique_lock lock(table().mutex);
    Member& member = table().members[index_];
    member.override_path.reset();
    member.resolved.reset();
    ++table().changes;
  }
  forget_failed_lookups();
}

void detail::override_path(Enum member, std::string class_path) {
  {
    std::unique_lock lock(table().mutex);
    Member& entry = table().members[MemberAccess::index(member)];
    entry.override_path = std::move(class_path);
    entry.resolved.reset();
    ++table().changes;
  }
  forget_failed_lookups();
}

void forget_resolved_members() {
  std::unique_lock lock(table().mutex);
  for (Member& member : table().members) member.resolved.reset();
  ++table().changes;
}

std::uint64_t registration_changes() { return table().changes.load(std::memory_order_acquire); }

std::ostream& operator<<(std::ostream& stream, Enum member) { return stream << member.name(); }

}  // namespace ditattn
