// MPI for python/ditattn/parallel.py: a library of its own, loaded when asked for.

#include "ditattn/mpi.hpp"

#include <tvm/ffi/reflection/registry.h>

#include <memory>

#include "communicators.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using parallel::MpiSession;
using parallel::Seconds;

class MpiSessionObj : public tvm::ffi::Object {
 public:
  explicit MpiSessionObj(Seconds timeout) : session(std::make_unique<MpiSession>(timeout)) {}
  std::unique_ptr<MpiSession> session;
  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.MpiSession", MpiSessionObj, tvm::ffi::Object);
};

class MpiSessionRef : public tvm::ffi::ObjectRef {
 public:
  explicit MpiSessionRef(Seconds timeout) { data_ = tvm::ffi::make_object<MpiSessionObj>(timeout); }
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(MpiSessionRef, tvm::ffi::ObjectRef, MpiSessionObj);
};

TVM_FFI_STATIC_INIT_BLOCK() {
  refl::ObjectDef<MpiSessionObj>();
  refl::GlobalDef()
      .def("ditattn.mpi_begin", [](double timeout) { return MpiSessionRef(Seconds(timeout)); })
      .def("ditattn.mpi_world", [](const MpiSessionRef& mpi) { return CommunicatorRef(mpi->session->world()); })
      .def("ditattn.mpi_end", [](const MpiSessionRef& mpi) { mpi->session.reset(); })
      .def("ditattn.mpi_communicator", [](int fortran_handle, double timeout) {
        return CommunicatorRef(parallel::mpi_communicator(fortran_handle, Seconds(timeout)));
      });
}

}  // namespace
}  // namespace ditattn::python
