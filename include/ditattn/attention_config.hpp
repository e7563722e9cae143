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

/// One choice: a backend and its options.
struct AttentionSpec {
  std::string backend;                ///< a member's name, upper-cased; never "AUTO"
  BackendKwargs backend_kwargs = {};  ///< for `ImplConfig::backend_kwargs`
};

/// Backends by role. A value; building one touches no registry, so names are checked when they are used.
struct AttentionConfig {
  std::optional<AttentionSpec> default_spec = std::nullopt;
  std::map<std::string, AttentionSpec> per_role = {};  ///< nested roles joined by dots: "ltx2.audio_to_video"

  /// From JSON:
  ///
  ///     {"default": "FLASH_ATTN" | {"backend": "FLASH_ATTN", "backend_kwargs": {…}},
  ///      "per_role": {"self": …, "ltx2": {"audio_to_video": …}}}
  ///
  /// Names in any case; "auto", or null, means "not set". ConfigError, with vLLM-Omni's text where it has one, says
  /// what is wrong where. A spec takes vLLM-Omni's other keys as far as a backend here has them: `quant`
  /// (FLASHINFER_ATTN) goes to `backend_kwargs`; the rest is refused.
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
