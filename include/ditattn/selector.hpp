#pragma once

/// Which backend, where code does not name one: configuration by role, environment, platform default.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/attention_config.hpp"
#include "ditattn/export.hpp"
#include "ditattn/registry.hpp"
#include "ditattn/tuner.hpp"

namespace ditattn {

/// What a platform's default depends on.
struct Platform {
  std::string device = "cpu";           ///< "cpu", "cuda", or one of define_platform
  std::int64_t compute_capability = 0;  ///< cuda: 10 · major + minor, 90 for Hopper
  std::int64_t cudnn_version = 0;       ///< cuda: as cuDNN reports it, 90500 for 9.5; 0: none
};

/// The platform's backends in the order they are tried; the first that is available and takes the head size is its
/// default. ValueError for a device nobody defined.
DITATTN_API std::vector<DiffusionAttentionBackendEnum> platform_candidates(const Platform& platform);

/// Those of this machine's `device`. ImportError for one that this build cannot use.
DITATTN_API std::vector<DiffusionAttentionBackendEnum> platform_candidates(const std::string& device);

/// Sets the candidates of a device, for platforms that are not here (NPU, XPU) and embedders with an order of their
/// own. Thread-safe.
DITATTN_API void define_platform(const std::string& device, std::vector<DiffusionAttentionBackendEnum> candidates);

/// For code that does not know its head size yet.
inline constexpr std::int64_t kHeadSizeUnknown = -1;

/// Which backend was chosen, and why.
struct Selection {
  DiffusionAttentionBackendEnum member;              ///< for a platform default: its first candidate
  BackendClass backend;                              ///< the class; never null
  std::optional<AttentionSpec> spec = std::nullopt;  ///< what named it, or bounds the automatic choice; else none
  /// "attention_config.per_role['self']", "attention_config.per_role['self'] (role_category fallback)",
  /// "attention_config.default", the same with " (DIFFUSION_ATTENTION_BACKEND)", or "platform default".
  std::string source = {};
  bool is_explicit = false;  ///< a backend is named: nothing replaces it, unless its `on_unusable` says so

  /// Options for `ImplConfig::backend_kwargs`.
  [[nodiscard]] BackendKwargs backend_kwargs() const { return spec ? spec->backend_kwargs : BackendKwargs(); }
};

/// The backend of a layer's role ("self", "cross", "ltx2.audio_to_video"; empty: none), before its problems are known.
///
/// In this order: `per_role[role]`, `per_role[role_category]`, `default`, which DIFFUSION_ATTENTION_BACKEND fills where
/// the configuration does not, and the platform's default for `device`. A backend that is named is explicit: never
/// replaced, unless its `on_unusable` says so, so ImportError where it cannot run here, ValueError where it lacks the
/// head size. The platform's default is one class over its candidates: a problem that was measured (tuner.hpp) goes to
/// the fastest within `max_error`, any other to the first, and one that this refuses to the next, which is logged once,
/// but a causal one never to a backend that aligns the diagonal otherwise, unless that makes no difference. ValueError,
/// with one reason per candidate, where none is left. Each resolution is logged once, with its source. Thread-safe.
DITATTN_API Selection get_attn_backend_for_role(const std::string& role, std::int64_t head_size = kHeadSizeUnknown,
                                                const AttentionConfig& config = {},
                                                const std::string& role_category = {},
                                                const std::string& device = "cpu");

/// As above for one problem, known now: a platform default is then the candidate that takes it.
DITATTN_API Selection select_backend(const Problem& problem, const std::string& role = {},
                                     const AttentionConfig& config = {}, const std::string& role_category = {});

/// One member's answer to a problem.
struct MemberVerdict {
  DiffusionAttentionBackendEnum member;  ///< whose answer it is
  BackendClass backend;                  ///< null where the class cannot be imported
  bool is_candidate = false;             ///< would be tried; the others only tell what they would say
  Verdict verdict;          ///< what speaks against it here, unavailability and errors that were measured included
  std::string kernel = {};  ///< which would compute, if it takes the problem and its engine tells
  std::optional<TunedResult> tuned = std::nullopt;  ///< automatic: what was measured of it for this problem
};

/// What `select_backend` would choose, and why not something else.
struct Explanation {
  std::string source;        ///< as `Selection::source`
  bool is_explicit = false;  ///< a backend is named: nothing replaces it, unless its `on_unusable` says so
  /// Candidates in the order in which they are tried, then all other members.
  std::vector<MemberVerdict> members;
  std::optional<DiffusionAttentionBackendEnum> chosen;  ///< none where every candidate refuses
  std::string why = {};                                 ///< automatic: whether by measurement or by the order, and why
};

/// Explains a choice before anything runs, with every reason and its values, where `select_backend` would throw or
/// choose. Loads what has to be loaded to ask. Throws for a configuration or a device that does not exist, as
/// `select_backend`; never because a backend is broken or refuses. Nothing is logged. Thread-safe.
DITATTN_API Explanation explain(const Problem& problem, const std::string& role = {},
                                const AttentionConfig& config = {}, const std::string& role_category = {});

}  // namespace ditattn
