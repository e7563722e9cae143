// Compiled against another interface version.

#include "tests/abi/plugins/good_backends.hpp"

extern "C" DITATTN_API int __tvm_ffi_ditattn_backend(void* /*self*/, const TVMFFIAny* args, int num_args,
                                                     TVMFFIAny* result) {
  return ditattn::export_backend_table(find_good, DITATTN_INTERFACE_VERSION + 1, args, num_args, result);
}
