// NCCL for python/ditattn/parallel.py: a library of its own, loaded when asked for.

#include "ditattn/nccl.hpp"

#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

#include <algorithm>

#include "communicators.hpp"
#include "ditattn/errors.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using parallel::NcclId;
using parallel::Seconds;
using tvm::ffi::Bytes;

Bytes new_id() {
  const NcclId id = parallel::nccl_id();
  return {id.data(), id.size()};
}

CommunicatorRef join(const Bytes& bytes, int rank, int size, int device, double timeout) {
  NcclId id{};
  if (bytes.size() != id.size()) {
    throw ValueError("An id of NCCL has " + std::to_string(id.size()) + " bytes, got " + std::to_string(bytes.size()) +
                     ".");
  }
  std::copy_n(bytes.data(), id.size(), id.begin());
  return CommunicatorRef(parallel::nccl_communicator(id, rank, size, device, Seconds(timeout)));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  refl::GlobalDef()
      .def("ditattn.nccl_id", new_id)
      .def("ditattn.nccl_communicator", join)
      .def("ditattn.nccl_over", [](const CommunicatorRef& over, int device) {
        return CommunicatorRef(parallel::nccl_communicator(over->communicator, device));
      });
}

}  // namespace
}  // namespace ditattn::python
