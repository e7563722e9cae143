#include "ditattn/errors.hpp"

#include <fmt/format.h>
#include <tvm/ffi/string.h>

namespace ditattn {

Error::Error(const std::string& kind, const std::string& message) : tvm::ffi::Error(kind, message, "") {}
ValueError::ValueError(const std::string& message) : Error("ValueError", message) {}
ImportError::ImportError(const std::string& message) : Error("ImportError", message) {}
NotImplementedError::NotImplementedError(const std::string& message) : Error("NotImplementedError", message) {}
FileError::FileError(const std::string& message) : Error("OSError", message) {}
MemoryError::MemoryError(const std::string& message) : Error("MemoryError", message) {}
CommunicationError::CommunicationError(const std::string& message) : Error("RuntimeError", message) {}
TimeoutError::TimeoutError(const std::string& message) : Error("TimeoutError", message) {}

void rethrow(const tvm::ffi::Error& error) {
  const std::string kind = error.kind();
  const std::string message = error.message();
  if (kind == "ValueError") throw ValueError(message);
  if (kind == "ImportError" || kind == "ModuleNotFoundError") throw ImportError(message);
  if (kind == "NotImplementedError") throw NotImplementedError(message);
  if (kind == "OSError") throw FileError(message);
  // What tvm-ffi makes of a std::bad_alloc that reaches a C function.
  if (kind == "MemoryError" || message == "std::bad_alloc") throw MemoryError(message);
  if (kind == "TimeoutError") throw TimeoutError(message);
  throw Error(kind, message);
}

std::string option_text(const tvm::ffi::Any& value) {
  if (value == nullptr) return "None";
  if (const auto text = value.as<tvm::ffi::String>()) return fmt::format("'{}'", std::string(*text));
  if (const auto truth = value.as<bool>()) return *truth ? "true" : "false";
  if (const auto whole = value.as<std::int64_t>()) return fmt::format("{}", *whole);
  if (const auto number = value.as<double>()) return fmt::format("{}", *number);
  return "a value of type " + value.GetTypeKey();
}

}  // namespace ditattn
