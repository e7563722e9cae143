#include "tools/ditattn/exit_status.hpp"

#include <new>

#include "ditattn/attention_config.hpp"

namespace ditattn::cli {

const char* const kExitStatusHelp =
    "Exit status:\n"
    "  0  done\n"
    "  2  wrong usage: flags, verbs, backend names, configuration, class-path syntax\n"
    "  3  a backend is not registered or cannot be imported, or its library or device is unavailable\n"
    "  4  a file is missing or malformed, or tensors or a problem were refused\n"
    "  5  an explicitly named backend exceeded --max-error, or --guard found wrong numbers\n"
    "  1  anything else\n";

Failure current_failure() {
  try {
    throw;
  } catch (const UsageError& error) {
    return {kUsage, error.message()};
  } catch (const UnknownBackendError& error) {
    return {kUsage, error.message()};
  } catch (const ClassPathError& error) {
    return {kUsage, error.message()};
  } catch (const ConfigError& error) {
    return {kUsage, error.message()};
  } catch (const NotRegisteredError& error) {
    return {kUnavailable, error.message()};
  } catch (const ImportError& error) {
    return {kUnavailable, error.message()};
  } catch (const ValueError& error) {
    return {kRefused, error.message()};
  } catch (const NotImplementedError& error) {
    return {kRefused, error.message()};
  } catch (const FileError& error) {
    return {kRefused, error.message()};
  } catch (const MemoryError& error) {
    return {kRefused, error.message()};
  } catch (const tvm::ffi::Error& error) {
    return {kFailure, error.kind() + ": " + error.message()};
  } catch (const std::bad_alloc&) {
    return {kRefused, "Out of memory."};
  } catch (const std::exception& error) {
    return {kFailure, error.what()};
  } catch (...) {
    return {kFailure, "Something that is not a std::exception was thrown."};
  }
}

}  // namespace ditattn::cli
