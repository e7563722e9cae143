#pragma once

/// What crosses to Python of ranks: one's end of a group of them.

#include <tvm/ffi/memory.h>
#include <tvm/ffi/object.h>

#include <memory>
#include <utility>

#include "ditattn/communicator.hpp"

namespace ditattn::python {

/// Holds a Communicator.
class CommunicatorObj : public tvm::ffi::Object {
 public:
  explicit CommunicatorObj(std::shared_ptr<parallel::Communicator> held) : communicator(std::move(held)) {}
  std::shared_ptr<parallel::Communicator> communicator;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.Communicator", CommunicatorObj, tvm::ffi::Object);
};

class CommunicatorRef : public tvm::ffi::ObjectRef {
 public:
  explicit CommunicatorRef(std::shared_ptr<parallel::Communicator> held) {
    data_ = tvm::ffi::make_object<CommunicatorObj>(std::move(held));
  }
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(CommunicatorRef, tvm::ffi::ObjectRef, CommunicatorObj);
};

}  // namespace ditattn::python
