// Linked to a library that is not there when it is loaded (absent.cpp).

#include "tests/abi/plugins/good_backends.hpp"

int ditattn_test_absent();

static ditattn::BackendClass find(std::string_view class_name) {
  return ditattn_test_absent() == 1 ? find_good(class_name) : nullptr;
}
DITATTN_EXPORT_BACKENDS(find)
