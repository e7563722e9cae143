#include "ditattn/errors.hpp"

#include <gtest/gtest.h>

#include <type_traits>

#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::error_text;

TEST(Errors, KindIsThePythonExceptionsName) {
  EXPECT_EQ(ValueError("x").kind(), "ValueError");
  EXPECT_EQ(UnknownBackendError("x").kind(), "ValueError");
  EXPECT_EQ(NotRegisteredError("x").kind(), "ValueError");
  EXPECT_EQ(ClassPathError("x").kind(), "ValueError");
  EXPECT_EQ(ImportError("x").kind(), "ImportError");
  EXPECT_EQ(NotImplementedError("x").kind(), "NotImplementedError");
  EXPECT_EQ(FileError("x").kind(), "OSError");
  EXPECT_EQ(MemoryError("x").kind(), "MemoryError");
  EXPECT_EQ(Error("KeyError", "x").kind(), "KeyError");
}

TEST(Errors, AllDeriveFromErrorAndCrossAsTvmErrors) {
  static_assert(std::is_base_of_v<tvm::ffi::Error, Error>);
  static_assert(std::is_base_of_v<Error, ValueError> && std::is_base_of_v<Error, ImportError> &&
                std::is_base_of_v<Error, NotImplementedError> && std::is_base_of_v<Error, FileError> &&
                std::is_base_of_v<Error, MemoryError>);
  static_assert(std::is_base_of_v<ValueError, UnknownBackendError> && std::is_base_of_v<ValueError, ClassPathError> &&
                std::is_base_of_v<ValueError, NotRegisteredError>);
  try {
    throw ImportError("no such module 'ä'");
  } catch (const std::exception& error) {
    EXPECT_STREQ(error.what(), "no such module 'ä'");
  }
}

// Each kind through `rethrow`, as it comes back from a plug-in's table.
template <class Expected>
void expect_rethrown_as(const char* kind) {
  const auto rethrown = [&] { rethrow(tvm::ffi::Error(kind, "the text", "")); };
  EXPECT_EQ(error_text<Expected>(rethrown), "the text") << kind;
}

TEST(Errors, RethrowGivesTheTypeOfTheKind) {
  expect_rethrown_as<ValueError>("ValueError");
  expect_rethrown_as<ImportError>("ImportError");
  expect_rethrown_as<ImportError>("ModuleNotFoundError");
  expect_rethrown_as<NotImplementedError>("NotImplementedError");
  expect_rethrown_as<FileError>("OSError");
  expect_rethrown_as<MemoryError>("MemoryError");
}

TEST(Errors, RethrowKeepsAKindWithoutATypeOfItsOwn) {
  try {
    rethrow(tvm::ffi::Error("KeyError", "no key", ""));
    FAIL() << "nothing was thrown";
  } catch (const ValueError&) {
    FAIL() << "a KeyError is not a ValueError";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), "KeyError");
    EXPECT_EQ(error.message(), "no key");
  }
}

}  // namespace
}  // namespace ditattn
