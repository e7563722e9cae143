#pragma once

#include <string>

namespace ditattn::cli {

/// A member that cannot be used, as a look-up or `validate_available` described it.
struct Unavailable {
  std::string member;      ///< "SAGE_ATTN"
  std::string class_path;  ///< empty where none is registered
  std::string reason;      ///< the error's whole text
};

/// What to do about it, in one sentence or two. Never empty: where nothing is known, it says what the reason means.
std::string remedy_for(const Unavailable& member);

}  // namespace ditattn::cli
