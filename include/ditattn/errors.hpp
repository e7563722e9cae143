#pragma once

/// Errors. Every error the library throws derives from `ditattn::Error`, which is a `tvm::ffi::Error`: it crosses
/// language boundaries with its kind, and arrives in Python as the exception of that name.

#include <tvm/ffi/any.h>
#include <tvm/ffi/error.h>

#include <string>

#include "ditattn/export.hpp"

namespace ditattn {

/// Base of all errors. `kind()` is the name of the matching Python exception.
class DITATTN_API Error : public tvm::ffi::Error {
 public:
  /// `kind`: a Python exception's name.
  Error(const std::string& kind, const std::string& message);
};

/// A wrong value: name, class path, configuration, tensor or problem.
class DITATTN_API ValueError : public Error {
 public:
  /// `message` says what is wrong, its value, and what is allowed.
  explicit ValueError(const std::string& message);
};

/// Look-up by a name that no member has.
class DITATTN_API UnknownBackendError : public ValueError {
  using ValueError::ValueError;
};

/// A member without a class path (empty default, no override) was used.
class DITATTN_API NotRegisteredError : public ValueError {
  using ValueError::ValueError;
};

/// A class path that is not `package.module.Class`.
class DITATTN_API ClassPathError : public ValueError {
  using ValueError::ValueError;
};

/// The way to a backend class failed: no such module, no such class in it, load failure, or its library or device
/// is missing on this machine.
class DITATTN_API ImportError : public Error {
 public:
  /// `message` has the class path, or library, and the reason.
  explicit ImportError(const std::string& message);
};

/// The backend exists but cannot do this problem (architecture, device, dtype, feature).
class DITATTN_API NotImplementedError : public Error {
 public:
  /// `message` names the backend, the value, and what it does.
  explicit NotImplementedError(const std::string& message);
};

/// A file is missing, unreadable, malformed, or could not be written.
class DITATTN_API FileError : public Error {
 public:
  /// `message` names the file.
  explicit FileError(const std::string& message);
};

/// Memory could not be had; the message names the size asked for.
class DITATTN_API MemoryError : public Error {
 public:
  /// `message` names the size.
  explicit MemoryError(const std::string& message);
};

/// Ranks that compute together could not go on: one of them failed, or they called different operations.
class DITATTN_API CommunicationError : public Error {
 public:
  /// `message` names the rank and its reason.
  explicit CommunicationError(const std::string& message);
};

/// A rank did not come within the time it was given; the message names it, the operation and the seconds.
class DITATTN_API TimeoutError : public Error {
 public:
  /// `message` names the rank, the operation and the seconds.
  explicit TimeoutError(const std::string& message);
};

/// Throws `error` again as the `ditattn` type of its kind (errors that came through a plug-in's function table have
/// only their kind). Kinds without a type of their own become a plain `ditattn::Error`.
[[noreturn]] DITATTN_API void rethrow(const tvm::ffi::Error& error);

/// An option's value as an error shows it; of what is no string, number, boolean or None, the type.
DITATTN_API std::string option_text(const tvm::ffi::Any& value);

}  // namespace ditattn
