// What python/ditattn/parallel.py needs: threads as ranks, transports written in Python, attention over ranks.

#include "ditattn/parallel.hpp"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/reflection/registry.h>

#include <cstring>

#include "attention.hpp"
#include "communicators.hpp"
#include "ditattn/log.hpp"
#include "objects.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using parallel::Communicator;
using parallel::Mesh;
using parallel::Operation;
using parallel::ParallelAttention;
using parallel::ParallelGroup;
using parallel::Pending;
using parallel::ReceiveBlock;
using parallel::Seconds;
using parallel::SendBlock;
using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::String;

// --- Transports written in Python ---------------------------------------------------------------------------------

// Errors of Python as those of a transport.
Any call(const Function& function, auto&&... arguments) {
  try {
    return function(std::forward<decltype(arguments)>(arguments)...);
  } catch (const Error&) {
    throw;
  } catch (const tvm::ffi::Error& error) {
    if (error.kind() == "RuntimeError") throw CommunicationError(std::string(error.message()));
    rethrow(error);
  }
}

class PythonPending final : public Pending {
 public:
  explicit PythonPending(Function wait) : wait_(std::move(wait)) {}
  void wait() override { call(wait_); }

 private:
  Function wait_;
};

// `start(operation, [(rank, bytes to send)], [(rank, bytes to receive)])` returns the function that waits, bytes being
// tensors over the memory, in order of ranks; what goes to this rank itself is copied here. `split(colour, key)`
// returns a communicator.
class PythonCommunicator final : public Communicator {
 public:
  PythonCommunicator(int rank, int size, Seconds timeout, Function start, Function split, Function abort)
      : Communicator(rank, size, timeout),
        start_(std::move(start)),
        split_(std::move(split)),
        abort_(std::move(abort)) {}

  std::unique_ptr<Pending> start(Operation operation, std::span<const SendBlock> sends,
                                 std::span<const ReceiveBlock> receives, DLDevice device) override {
    if (!takes(device)) throw NotImplementedError("Transports written in Python exchange host memory only.");
    Array<Any> sent;
    Array<Any> received;
    const void* own = nullptr;
    for (const auto& [peer, data, bytes] : sends) {
      if (peer == rank()) {
        own = data;
      } else {
        sent.push_back(Array<Any>{peer, memory(const_cast<void*>(data), bytes)});
      }
    }
    for (const auto& [peer, data, bytes] : receives) {
      if (peer != rank()) {
        received.push_back(Array<Any>{peer, memory(data, bytes)});
      } else if (own != nullptr) {
        std::memcpy(data, own, static_cast<std::size_t>(bytes));
      }
    }
    const Any wait =
        call(start_, static_cast<int>(operation), String(std::string(operation_name(operation))), sent, received);
    return std::make_unique<PythonPending>(wait.cast<Function>());
  }

  std::shared_ptr<Communicator> split(int colour, int key) override {
    return call(split_, colour, key).cast<CommunicatorRef>()->communicator;
  }

  void abort(const std::string& reason) noexcept override {
    try {
      abort_(String(reason));
    } catch (const std::exception& error) {
      log(LogLevel::warning, std::string("parallel: other ranks could not be told of an error: ") + error.what());
    }
  }

 private:
  static Tensor memory(void* data, std::int64_t bytes) { return wrap(data, {bytes}, {kDLUInt, 8, 1}); }

  Function start_;
  Function split_;
  Function abort_;
};

// --- Objects ------------------------------------------------------------------------------------------------------

class GroupObj : public tvm::ffi::Object {
 public:
  explicit GroupObj(std::shared_ptr<ParallelGroup> held) : group(std::move(held)) {}
  std::shared_ptr<ParallelGroup> group;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.ParallelGroup", GroupObj, tvm::ffi::Object);
};

class GroupRef : public tvm::ffi::ObjectRef {
 public:
  GroupRef(std::shared_ptr<Communicator> communicator, const Mesh& mesh) {
    data_ = tvm::ffi::make_object<GroupObj>(std::make_shared<ParallelGroup>(std::move(communicator), mesh));
  }
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(GroupRef, tvm::ffi::ObjectRef, GroupObj);
};

class ParallelLayerObj : public tvm::ffi::Object {
 public:
  explicit ParallelLayerObj(std::unique_ptr<ParallelAttention> held) : layer(std::move(held)) {}
  std::unique_ptr<ParallelAttention> layer;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.ParallelAttention", ParallelLayerObj, tvm::ffi::Object);
};

class ParallelLayerRef : public tvm::ffi::ObjectRef {
 public:
  explicit ParallelLayerRef(std::unique_ptr<ParallelAttention> layer) {
    data_ = tvm::ffi::make_object<ParallelLayerObj>(std::move(layer));
  }
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(ParallelLayerRef, tvm::ffi::ObjectRef, ParallelLayerObj);
};

ParallelLayerRef make_layer(const BackendRef& backend, const Dict& config, const GroupRef& group) {
  const ImplConfig layer{.num_heads = get_or<std::int64_t>(config, "num_heads", 1),
                         .head_size = get_or<std::int64_t>(config, "head_size", 1),
                         .softmax_scale = given<double>(config, "softmax_scale"),
                         .causal = get_or(config, "causal", false),
                         .num_kv_heads = given<std::int64_t>(config, "num_kv_heads"),
                         .prefix = get_or(config, "prefix", String()),
                         .role = get_or(config, "role", String()),
                         .backend_kwargs = get_or(config, "backend_kwargs", BackendKwargs())};
  return ParallelLayerRef(std::make_unique<ParallelAttention>(backend->backend, layer, group->group));
}

Any forward(const ParallelLayerRef& layer, const Tensor& query, const Tensor& key, const Tensor& value,
            const AttentionMetadata& metadata, const Optional<Tensor>& out, const Optional<Tensor>& lse,
            bool return_lse) {
  ForwardOutputs outputs;
  try {
    outputs = outputs_for(query, metadata, out, lse, return_lse);
  } catch (const std::exception& error) {  // the others wait for this rank's word
    layer->layer->refuse(error.what(), query.device());
    throw;
  }
  return results_of(layer->layer->forward(query, key, value, metadata, outputs), outputs, return_lse);
}

Array<CommunicatorRef> thread_ranks(int size, double timeout) {
  const parallel::ThreadWorld world(size, Seconds(timeout));
  Array<CommunicatorRef> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.push_back(CommunicatorRef(world.communicator(rank)));
  return ranks;
}

Array<int> degrees(const Mesh& mesh) { return {mesh.ulysses, mesh.ring, mesh.allgather}; }

TVM_FFI_STATIC_INIT_BLOCK() {
  refl::ObjectDef<CommunicatorObj>();
  refl::ObjectDef<GroupObj>();
  refl::ObjectDef<ParallelLayerObj>();
  refl::GlobalDef()
      .def("ditattn.thread_ranks", thread_ranks)
      .def("ditattn.python_communicator",
           [](int rank, int size, double timeout, const Function& start, const Function& split, const Function& abort) {
             return CommunicatorRef(
                 std::make_shared<PythonCommunicator>(rank, size, Seconds(timeout), start, split, abort));
           })
      .def("ditattn.communicator_rank", [](const CommunicatorRef& ref) { return ref->communicator->rank(); })
      .def("ditattn.communicator_size", [](const CommunicatorRef& ref) { return ref->communicator->size(); })
      .def("ditattn.communicator_timeout",
           [](const CommunicatorRef& ref) { return ref->communicator->timeout().count(); })
      .def("ditattn.barrier", [](const CommunicatorRef& ref) { ref->communicator->barrier(); })
      .def("ditattn.raise_if_failed", [](const CommunicatorRef& ref) { ref->communicator->throw_if_failed(); })
      .def("ditattn.abort",
           [](const CommunicatorRef& ref, const std::string& reason) { ref->communicator->abort(reason); })
      .def("ditattn.parallel_group",
           [](const CommunicatorRef& ref, int ulysses, int ring, int allgather) {
             return GroupRef(ref->communicator, {.ulysses = ulysses, .ring = ring, .allgather = allgather});
           })
      .def("ditattn.parallel_layer", make_layer)
      .def("ditattn.parallel_forward", forward)
      .def("ditattn.parallel_refuse",
           [](const ParallelLayerRef& layer, const std::string& reason, bool on_host) {
             layer->layer->refuse(reason, on_host ? kCpu : DLDevice{kDLCUDA, 0});
           })
      .def("ditattn.mesh_name",
           [](int ulysses, int ring, int allgather) {
             return String(parallel::mesh_name({.ulysses = ulysses, .ring = ring, .allgather = allgather}));
           })
      .def("ditattn.parse_mesh", [](const std::string& text) { return degrees(parallel::parse_mesh(text)); })
      .def("ditattn.balanced_lengths", [](std::int64_t tokens, int ranks) {
        const std::vector<std::int64_t> lengths = parallel::balanced_lengths(tokens, ranks);
        return Array<std::int64_t>(lengths.begin(), lengths.end());
      });
}

}  // namespace
}  // namespace ditattn::python
