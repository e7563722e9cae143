#pragma once

#include <string>

#include "ditattn/registry.hpp"
#include "tools/ditattn/output.hpp"

namespace ditattn::cli {

/// What can be found out about one member without running it.
struct BackendInfo {
  DiffusionAttentionBackendEnum member;
  std::string class_path;  ///< empty where neither a default nor an override is set
  BackendClass backend;    ///< null where the class cannot be imported
  bool available = false;
  std::string reason;  ///< why it is not available

  /// What computes; empty where the class cannot be imported.
  [[nodiscard]] std::string engine() const { return backend ? backend->capabilities().engine : std::string(); }
};

/// Imports the member's class and asks whether it can run here. A broken backend is described, never thrown.
BackendInfo inspect(DiffusionAttentionBackendEnum member);

/// The member's entry of `list --json`.
Json to_json(const BackendInfo& info);

/// A reason's first sentence without the class path, for a table.
std::string short_reason(const std::string& reason);

}  // namespace ditattn::cli
