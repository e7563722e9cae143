#pragma once

#include <fmt/format.h>

#include <exception>
#include <string>

#include "ditattn/errors.hpp"

namespace ditattn::parallel {

/// What was thrown, for other ranks: its kind and message.
inline std::string error_text(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const tvm::ffi::Error& known) {
    return fmt::format("{}: {}", std::string(known.kind()), known.message());
  } catch (const std::exception& standard) {
    return fmt::format("an exception: {}", standard.what());
  } catch (...) {
    return "something that is not a std::exception";
  }
}

}  // namespace ditattn::parallel
