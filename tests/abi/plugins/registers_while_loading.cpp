// Registers a class while it is being loaded, as a plug-in of an embedder may.

#include <ditattn/registry.hpp>

#include "tests/abi/plugins/good_backends.hpp"

static const bool registered = [] {
  ditattn::register_backend_class("abi.registered_while_loading.Doubler", find_good("Doubler"));
  return true;
}();

DITATTN_EXPORT_BACKENDS(find_good)
