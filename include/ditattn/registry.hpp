#pragma once

/// The diffusion attention backend registry: members, overrides, and the way from a name to a class.

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/export.hpp"

namespace ditattn {

/// Enumeration of all supported diffusion attention backends. The value is the default class path; it can be
/// overridden at run time. A small value type; all operations are thread-safe.
class DITATTN_API DiffusionAttentionBackendEnum {
 public:
  static const DiffusionAttentionBackendEnum FLASH_ATTN;       ///< our own exact kernels
  static const DiffusionAttentionBackendEnum TORCH_SDPA;       ///< PyTorch's attention, or its semantics
  static const DiffusionAttentionBackendEnum SAGE_ATTN;        ///< quantized to 8 bits
  static const DiffusionAttentionBackendEnum SAGE_ATTN_3;      ///< microscaled FP4
  static const DiffusionAttentionBackendEnum CUDNN_ATTN;       ///< cuDNN's fused attention
  static const DiffusionAttentionBackendEnum FLASHINFER_ATTN;  ///< FlashInfer's prefill kernels
  static const DiffusionAttentionBackendEnum CUSTOM;           ///< empty path: the user's own

  /// Exact spelling; UnknownBackendError (a ValueError) lists all members.
  static DiffusionAttentionBackendEnum from_name(std::string_view name);
  /// All members in definition order.
  static std::vector<DiffusionAttentionBackendEnum> members();
  /// Adds a member. Defining a name again with the same path returns it; with another path is a ValueError.
  static DiffusionAttentionBackendEnum define(std::string_view name, std::string_view default_path = "");

  /// "FLASH_ATTN".
  [[nodiscard]] std::string name() const;
  /// The default class path, never the override.
  [[nodiscard]] std::string value() const;
  /// The override, else the default; without the class name: the part before the last dot. NotRegisteredError (a
  /// ValueError) where both are empty.
  [[nodiscard]] std::string get_path(bool include_classname = true) const;
  /// Resolves `get_path()`; loads what has to be loaded. ImportError names the class path, every place looked in and
  /// the loader's reason; NotRegisteredError and ClassPathError are ValueErrors. The outcome is remembered, failures
  /// too, until a registration changes.
  [[nodiscard]] BackendClass get_class() const;
  /// A class has been registered in the place of the default.
  [[nodiscard]] bool is_overridden() const;
  /// Removes the override; nothing happens without one.
  void clear_override() const;

  /// The same member.
  friend bool operator==(DiffusionAttentionBackendEnum, DiffusionAttentionBackendEnum) = default;

 private:
  friend struct MemberAccess;
  constexpr explicit DiffusionAttentionBackendEnum(std::uint32_t index) : index_(index) {}
  std::uint32_t index_;
};

inline constexpr DiffusionAttentionBackendEnum DiffusionAttentionBackendEnum::FLASH_ATTN{0};
inline constexpr DiffusionAttentionBackendEnum DiffusionAttentionBackendEnum::TORCH_SDPA{1};
inline constexpr DiffusionAttentionBackendEnum DiffusionAttentionBackendEnum::SAGE_ATTN{2};
inline constexpr DiffusionAttentionBackendEnum DiffusionAttentionBackendEnum::SAGE_ATTN_3{3};
inline constexpr DiffusionAttentionBackendEnum DiffusionAttentionBackendEnum::CUDNN_ATTN{4};
inline constexpr DiffusionAttentionBackendEnum DiffusionAttentionBackendEnum::FLASHINFER_ATTN{5};
inline constexpr DiffusionAttentionBackendEnum DiffusionAttentionBackendEnum::CUSTOM{6};

/// Prints the member's name. (With fmt: `fmt::streamed(member)` or `member.name()`.)
DITATTN_API std::ostream& operator<<(std::ostream& stream, DiffusionAttentionBackendEnum member);

/// Makes `backend` findable under `class_path`, verbatim, before any file is looked for. A later registration of the
/// same path wins; classes already handed out stay alive.
DITATTN_API void register_backend_class(const std::string& class_path, BackendClass backend);

namespace detail {
/// "ns::Outer::Class" of a type as a class path: "ns.Outer.Class".
DITATTN_API std::string class_path_of(const std::type_info& type);
DITATTN_API void override_path(DiffusionAttentionBackendEnum member, std::string class_path);
}  // namespace detail

/// Records `class_path` as the member's override, unchecked: nothing is imported before `get_class()`. Returns the
/// identity function, as vLLM-Omni's does.
inline auto register_diffusion_backend(DiffusionAttentionBackendEnum member, std::string class_path) {
  detail::override_path(member, std::move(class_path));
  return [](auto&& backend) -> decltype(auto) { return std::forward<decltype(backend)>(backend); };
}

/// Registers the C++ class `Backend` (default-constructible, derived from AttentionBackend) under its qualified name,
/// dots for "::", and makes that the member's override.
template <class Backend>
requires std::is_base_of_v<AttentionBackend, Backend>
void register_diffusion_backend(DiffusionAttentionBackendEnum member) {
  std::string path = detail::class_path_of(typeid(Backend));
  register_backend_class(path, std::make_shared<Backend>());
  detail::override_path(member, std::move(path));
}

/// The decorator's form: `register_diffusion_backend(member)(std::type_identity<MyBackend>{})` registers the class
/// and returns its argument unchanged.
inline auto register_diffusion_backend(DiffusionAttentionBackendEnum member) {
  return [member]<class Backend>(std::type_identity<Backend> backend) {
    register_diffusion_backend<Backend>(member);
    return backend;
  };
}

/// Directories searched for `package/module.so`, in order: the installed backends beside the library, then the
/// absolute entries of DITATTN_PLUGIN_PATH.
DITATTN_API std::vector<std::string> plugin_search_path();

/// Resolves a class path as `get_class()` does, for paths that belong to no member.
DITATTN_API BackendClass resolve_class_path(const std::string& class_path);

}  // namespace ditattn

/// @cond Doxygen has no place for a specialisation of another namespace's template.
template <>
struct std::hash<ditattn::DiffusionAttentionBackendEnum> {
  std::size_t operator()(ditattn::DiffusionAttentionBackendEnum member) const {
    return std::hash<std::string>{}(member.name());
  }
};
/// @endcond
