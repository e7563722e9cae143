#pragma once

#include <optional>
#include <span>
#include <string>

#include "ditattn/export.hpp"

namespace ditattn {

/// One row of env.def.
struct EnvironmentVariable {
  const char* name;
  const char* meaning;
};

/// All variables of env.def, in its order.
DITATTN_API std::span<const EnvironmentVariable> environment_variables();

/// Names of env.def, for `environment`: reading a variable that the table lacks does not compile.
enum class Env {
#define DITATTN_ENV(name, meaning) name,
#include "core/env.def"
#undef DITATTN_ENV
};

/// The variable's value now; none where it is unset or empty.
DITATTN_API std::optional<std::string> environment(Env variable);

}  // namespace ditattn
