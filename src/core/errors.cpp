#include "ditattn/errors.hpp"

namespace ditattn {

Error::Error(const std::string& kind, const std::string& message) : tvm::ffi::Error(kind, message, "") {}
ValueError::ValueError(const std::string& message) : Error("ValueError", message) {}
ImportError::ImportError(const std::string& message) : Error("ImportError", message) {}
NotImplementedError::NotImplementedError(const std::string& message) : Error("NotImplementedError", message) {}
FileError::FileError(const std::string& message) : Error("OSError", message) {}
MemoryError::MemoryError(const std::string& message) : Error("MemoryError", message) {}

void rethrow(const tvm::ffi::Error& error) {
  const std::string kind = error.kind();
  const std::string message = error.message();
  if (kind == "ValueError") throw ValueError(message);
  if (kind == "ImportError" || kind == "ModuleNotFoundError") throw ImportError(message);
  if (kind == "NotImplementedError") throw NotImplementedError(message);
  if (kind == "OSError") throw FileError(message);
  if (kind == "MemoryError") throw MemoryError(message);
  throw Error(kind, message);
}

}  // namespace ditattn
