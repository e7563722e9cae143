// Throws while its class is looked up: what the class name asks for.

#include <ditattn/errors.hpp>

#include <stdexcept>

#include "tests/abi/plugins/good_backends.hpp"

static ditattn::BackendClass find(std::string_view class_name) {
  if (class_name == "ThrowsValueError") throw ditattn::ValueError("a value it does not like");
  if (class_name == "ThrowsRuntimeError") throw std::runtime_error("its library is too old");
  if (class_name == "ThrowsInt") throw 42;
  return find_good(class_name);
}
DITATTN_EXPORT_BACKENDS(find)
