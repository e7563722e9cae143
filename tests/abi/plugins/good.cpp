#include "tests/abi/plugins/good_backends.hpp"

DITATTN_EXPORT_BACKENDS(find_good)
