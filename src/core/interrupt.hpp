#pragma once

#include <tvm/ffi/error.h>

#include <exception>

namespace ditattn {

/// Whether Control-C came while a class in Python was at work. That says nothing of the class: it is thrown on wherever
/// a class that fails is not the end.
inline bool is_interrupt(const std::exception& error) {
  const auto* known = dynamic_cast<const tvm::ffi::Error*>(&error);
  return known != nullptr && known->kind() == "KeyboardInterrupt";
}

}  // namespace ditattn
