#include "core/environment.hpp"

#include <cstdlib>

namespace ditattn {
namespace {

constexpr EnvironmentVariable kVariables[] = {
#define DITATTN_ENV(name, meaning) {#name, meaning},
#include "core/env.def"
#undef DITATTN_ENV
};

}  // namespace

std::span<const EnvironmentVariable> environment_variables() { return kVariables; }

std::optional<std::string> environment(Env variable) {
  // Nothing from the environment in a set-uid process: it could name plug-ins to load.
  const char* value = ::secure_getenv(kVariables[static_cast<std::size_t>(variable)].name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

}  // namespace ditattn
