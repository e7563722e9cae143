#pragma once

#include <string>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/registry.hpp"

namespace ditattn {

/// Which backend was chosen, and why.
struct Selection {
  DiffusionAttentionBackendEnum member;
  BackendClass backend;
  std::string source;  ///< "DIFFUSION_ATTENTION_BACKEND", "platform default"
  bool is_explicit = false;
};

/// The platform's ordered candidates for a device ("cpu"); the first that is available is its default.
DITATTN_API std::vector<DiffusionAttentionBackendEnum> platform_candidates(const std::string& device);

/// The backend for a problem nobody named one for: DIFFUSION_ATTENTION_BACKEND (any case, "auto" or empty: not set;
/// explicit, so never replaced), else the platform's first candidate that is available and takes the problem.
DITATTN_API Selection select_backend(const Problem& problem);

}  // namespace ditattn
