#include "tools/ditattn/libraries.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <link.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>

namespace ditattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kTimeLimit{30};  // LibTorch from a cold network disk takes a while

// Answers of the child, by their first character.
constexpr char kFound = '+';
constexpr char kMissing = '-';

// The child's part: load, tell, end. Initialisers of the library may print; that goes nowhere.
[[noreturn]] void load_and_tell(const char* soname, int answer_to) {
  const rlimit no_core_file{.rlim_cur = 0, .rlim_max = 0};
  ::setrlimit(RLIMIT_CORE, &no_core_file);
  const int nowhere = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(nowhere, stream);
  std::string answer;
  link_map* map = nullptr;
  void* handle = ::dlopen(soname, RTLD_LAZY | RTLD_LOCAL);
  if (handle != nullptr && ::dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0) {
    answer = kFound + std::string(map->l_name);
  } else {
    const char* reason = ::dlerror();
    answer = kMissing + std::string(reason != nullptr ? reason : "no reason given");
  }
  const bool told = ::write(answer_to, answer.data(), answer.size()) == static_cast<ssize_t>(answer.size());
  ::_exit(told ? 0 : 1);
}

// What the child writes until it ends or the time is up.
std::string answer_of_child(int from) {
  std::string answer;
  const Clock::time_point end = Clock::now() + kTimeLimit;
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    pollfd wanted{.fd = from, .events = POLLIN, .revents = 0};
    const int ready = left > 0 ? ::poll(&wanted, 1, static_cast<int>(left)) : 0;
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return answer;
    char buffer[4096];
    const ssize_t count = ::read(from, buffer, sizeof buffer);
    if (count <= 0) return answer;
    answer.append(buffer, static_cast<std::size_t>(count));
  }
}

// Why a child gave no answer: it ended by itself, or was ended by us.
std::string silence(int status) {
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
    return fmt::format("it did not load within {} seconds", kTimeLimit.count());
  }
  if (WIFSIGNALED(status)) return fmt::format("it crashed while it was loaded ({})", ::strsignal(WTERMSIG(status)));
  return "its initialisers ended the process";
}

Probe probe_one(const char* soname) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return {.file = {}, .reason = fmt::format("not tried ({})", std::strerror(errno))};
  const pid_t child = ::fork();
  if (child == 0) load_and_tell(soname, ends[1]);
  const int fork_error = errno;
  ::close(ends[1]);
  std::string answer;
  int status = 0;
  if (child > 0) {
    answer = answer_of_child(ends[0]);
    if (answer.empty()) ::kill(child, SIGKILL);  // hangs, or has ended already
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
  }
  ::close(ends[0]);
  if (child < 0) return {.file = {}, .reason = fmt::format("not tried ({})", std::strerror(fork_error))};
  if (answer.empty()) return {.file = {}, .reason = fmt::format("{}: {}", soname, silence(status))};
  if (answer[0] == kFound) return {.file = answer.substr(1), .reason = {}};
  return {.file = {}, .reason = answer.substr(1)};
}

}  // namespace

namespace {

// In builds with GPU back ends, those; none otherwise.
std::vector<const char*> gpu_members(std::vector<const char*> members) {
#ifndef DITATTN_CUDA
  members.clear();
#endif
  return members;
}

}  // namespace

std::span<const OptionalLibrary> optional_libraries() {
  // PyPI's packages keep their libraries where the dynamic linker does not look: hence LD_LIBRARY_PATH.
  static const OptionalLibrary libraries[] = {
      {.name = "NVIDIA driver",
       .sonames = {"libcuda.so.1"},
       .purpose = "every GPU back end",
       .used_by = gpu_members({"TORCH_SDPA", "CUDNN_ATTN"}),
       .install = "Debian's nvidia-driver (component non-free), or NVIDIA's own; a container is given the host's "
                  "(docker run --gpus all)"},
      {.name = "CUDA runtime",
       .sonames = {"libcudart.so.13", "libcudart.so.12"},
       .purpose = "every GPU back end",
       .used_by = {},
       .install =
           "pip install nvidia-cuda-runtime (CUDA 13; its libraries: site-packages/nvidia/cu13/lib) or "
           "nvidia-cuda-runtime-cu12 (CUDA 12; nvidia/cuda_runtime/lib), and add that folder to LD_LIBRARY_PATH"},
      {.name = "cuDNN",
       .sonames = {"libcudnn.so.9"},
       .purpose = "CUDNN_ATTN",
       .used_by = gpu_members({"CUDNN_ATTN"}),
       .install =
           "pip install nvidia-cudnn-cu13 (or -cu12), and add site-packages/nvidia/cudnn/lib to LD_LIBRARY_PATH"},
      {.name = "LibTorch",
       .sonames = {"libtorch.so"},
       .purpose = "TORCH_SDPA with PyTorch's own kernels",
       .used_by = {},
       .install = "pip install torch, and add site-packages/torch/lib to LD_LIBRARY_PATH; or Debian's libtorch-dev"},
      {.name = "NCCL",
       .sonames = {"libnccl.so.2"},
       .purpose = "attention over several GPUs",
       .used_by = {},
       .install = "pip install nvidia-nccl-cu13 (or -cu12), and add site-packages/nvidia/nccl/lib to LD_LIBRARY_PATH"},
      {.name = "MPI",
       .sonames = {"libmpi.so.40", "libmpi.so"},
       .purpose = "attention over several machines' CPUs",
       .used_by = {},
       .install = "Debian's libopenmpi3 (and openmpi-bin for mpirun)"},
  };
  return libraries;
}

const OptionalLibrary* library_of(std::string_view soname) {
  const auto is_part_of = [&](std::string_view stem) {
    return soname.starts_with(stem) &&
           (soname.size() == stem.size() || soname[stem.size()] == '.' || soname[stem.size()] == '_');
  };
  for (const OptionalLibrary& library : optional_libraries()) {
    for (const std::string_view own : library.sonames) {
      if (is_part_of(own.substr(0, own.find('.')))) return &library;
    }
  }
  return nullptr;
}

Probe probe_library(const std::vector<const char*>& sonames) {
  std::string reasons;
  for (const char* soname : sonames) {
    Probe probe = probe_one(soname);
    if (!probe.file.empty()) return probe;
    reasons += (reasons.empty() ? "" : "; ") + probe.reason;
  }
  return {.file = {}, .reason = reasons};
}

}  // namespace ditattn::cli
