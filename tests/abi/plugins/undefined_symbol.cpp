// Calls what no library defines: eager binding refuses it while it is loaded, not in the middle of a forward.

#include "tests/abi/plugins/good_backends.hpp"

void ditattn_test_symbol_that_nobody_defines();

static ditattn::BackendClass find(std::string_view class_name) {
  ditattn_test_symbol_that_nobody_defines();
  return find_good(class_name);
}
DITATTN_EXPORT_BACKENDS(find)
