// Tables that are not what docs/plugins.md says: an error that names the module, never a call of nothing.

#include <gtest/gtest.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/function.h>

#include "ditattn/errors.hpp"
#include "ditattn/plugin.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using testing::error_text;
using tvm::ffi::Any;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;

BackendClass find_toy(std::string_view /*class_name*/) { return std::make_shared<testing::ToyBackend>(); }

// A toy's table with another value for one entry.
Any table_with(const char* entry, const Any& value) {
  auto table = backend_table(find_toy, "Toy", DITATTN_INTERFACE_VERSION).cast<Map<String, Any>>();
  table.Set(String(entry), value);
  return table;
}

TEST(TableBackend, NoneIsNoFunction) {
  for (const char* entry : {"get_name", "capabilities", "validate_available", "explain", "known_kwargs", "create"}) {
    EXPECT_EQ(error_text<ImportError>([&] { return backend_from_table(table_with(entry, Any()), "module"); }),
              "module: its table has no function '" + std::string(entry) + "'");
  }
}

TEST(TableBackend, AnOptionalFunctionMayBeNone) {
  EXPECT_EQ(backend_from_table(table_with("kernel_name", Any()), "module")->kernel_name({}), "");
}

TEST(TableBackend, CreateMustReturnAFunction) {
  const auto nothing = Function::FromPacked([](const tvm::ffi::AnyView*, int, Any* result) { *result = Any(); });
  const BackendClass backend = backend_from_table(table_with("create", nothing), "module");
  EXPECT_EQ(error_text<Error>([&] { return backend->make({}); }), "module: its function 'create' returned no function");
}

}  // namespace
}  // namespace ditattn
