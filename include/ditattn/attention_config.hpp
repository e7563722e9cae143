#pragma once

/// Which backend for which role, as users configure it: vLLM-Omni's AttentionConfig.

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/export.hpp"

namespace ditattn {

/// A configuration, or the flags that make one, is wrong.
class DITATTN_API ConfigError : public ValueError {
  using ValueError::ValueError;
};

/// What happens where the backend of a choice cannot be had here, or refuses a problem.
enum class OnUnusable {
  error,  ///< that is an error
  warn,   ///< the next one is taken, with a warning that has the reason, once per layer, or per role where it cannot be
          ///< had at all
  allow,  ///< the same as information
};

/// The `AttentionSpec::backend` of a choice that is left to measurements and the platform's order.
inline constexpr const char* kAutomatic = "AUTO";

/// One choice: a backend and its options, or what the automatic one must keep to.
struct AttentionSpec {
  std::string backend = kAutomatic;   ///< a member's name, upper-cased, or `kAutomatic`
  BackendKwargs backend_kwargs = {};  ///< for `ImplConfig::backend_kwargs`
  /// None: error for a backend that is named, allow for the automatic choice (where error means: the first usable one
  /// of the order alone, whatever was measured).
  std::optional<OnUnusable> on_unusable = std::nullopt;
  /// Members that a named backend may be replaced by, in this order (empty: the platform's order), or that the
  /// automatic choice is made among (empty: all).
  std::vector<std::string> allowed = {};
  /// Automatic: the largest measured error (`TunedResult::error`) of what is chosen; none: `exact_error`.
  std::optional<double> max_error = std::nullopt;

  /// No back end is named.
  [[nodiscard]] bool is_automatic() const { return backend == kAutomatic; }
};

/// Backends by role. A value; building one touches no registry, so names are checked when they are used.
struct AttentionConfig {
  std::optional<AttentionSpec> default_spec = std::nullopt;  ///< of roles without an entry; none: not set
  std::map<std::string, AttentionSpec> per_role = {};        ///< nested roles joined by dots: "ltx2.audio_to_video"

  /// From JSON:
  ///
  ///     {"default": "FLASH_ATTN" | {"backend": "FLASH_ATTN", "backend_kwargs": {…}},
  ///      "per_role": {"self": {"backend": "SAGE_ATTN", "on_unusable": "error" | "warn" | "allow", "allowed": […]},
  ///                   "cross": {"backend": "auto", "max_error": 0.05},
  ///                   "ltx2": {"audio_to_video": …}}}
  ///
  /// Names in any case; "auto" without further keys, or null, means "not set". ConfigError, with vLLM-Omni's text where
  /// it has one, says what is wrong where. A spec takes vLLM-Omni's other keys as far as a backend here has them:
  /// `quant` (FLASHINFER_ATTN) goes to `backend_kwargs`; the rest is refused.
  DITATTN_API static AttentionConfig from_json(const std::string& text);
  /// `from_json` of the text if it begins with "{", else of the file of that name (FileError).
  DITATTN_API static AttentionConfig from_json_or_file(const std::string& text_or_file);
};

/// vLLM-Omni's command-line flags; empty: not given.
struct AttentionFlags {
  std::string backend = {};  ///< --diffusion-attention-backend NAME: fills `default`
  std::string config = {};   ///< --diffusion-attention-config JSON|FILE
  /// --diffusion-attention-config.KEY VALUE, KEY dotted ("default.backend", "per_role.self"): on top of `config`.
  std::vector<std::pair<std::string, std::string>> settings = {};
};

/// The configuration that flags make. ConfigError also where both flags set `default`.
DITATTN_API AttentionConfig config_from_flags(const AttentionFlags& flags);

}  // namespace ditattn
