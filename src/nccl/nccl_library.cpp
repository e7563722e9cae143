#include "nccl/nccl_library.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include "ditattn/errors.hpp"

namespace ditattn::parallel {
namespace {

struct Opened {
  NcclLibrary library;
  std::string problem;  // empty: none
};

Opened open_library() {
  Opened opened;
  void* handle = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    opened.problem = ::dlerror();
    return opened;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(handle, name));
    if (function == nullptr && opened.problem.empty()) {
      opened.problem = fmt::format("libnccl.so.2 has no {}: it is older than 2.18", name);
    }
  };
  NcclLibrary& library = opened.library;
  find(library.get_unique_id, "ncclGetUniqueId");
  find(library.comm_init_rank_config, "ncclCommInitRankConfig");
  find(library.comm_split, "ncclCommSplit");
  find(library.comm_finalize, "ncclCommFinalize");
  find(library.comm_destroy, "ncclCommDestroy");
  find(library.comm_abort, "ncclCommAbort");
  find(library.comm_get_async_error, "ncclCommGetAsyncError");
  find(library.comm_count, "ncclCommCount");
  find(library.comm_user_rank, "ncclCommUserRank");
  find(library.comm_cu_device, "ncclCommCuDevice");
  find(library.group_start, "ncclGroupStart");
  find(library.group_end, "ncclGroupEnd");
  find(library.send, "ncclSend");
  find(library.recv, "ncclRecv");
  find(library.get_error_string, "ncclGetErrorString");
  find(library.get_last_error, "ncclGetLastError");
  return opened;
}

}  // namespace

const NcclLibrary& nccl() {
  static const Opened opened = open_library();
  if (opened.problem.empty()) return opened.library;
  throw ImportError(fmt::format(
      "Ranks on GPUs need NCCL, libnccl.so.2 of 2.18 or newer: {}. Install it (Debian and NVIDIA: libnccl2; PyPI: "
      "nvidia-nccl-cu13, which PyTorch brings) and put its folder into LD_LIBRARY_PATH, or import torch first.",
      opened.problem));
}

std::string nccl_error(std::string_view what, ncclResult_t result) {
  const char* last = nccl().get_last_error(nullptr);
  return fmt::format("{}: {}{}{}", what, nccl().get_error_string(result), last != nullptr && *last != '\0' ? ": " : "",
                     last != nullptr ? last : "");
}

}  // namespace ditattn::parallel
