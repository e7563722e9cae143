#include "tools/ditattn/ranks.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "parallel/mpi_job.hpp"
#include "tools/ditattn/command_line.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/output.hpp"

namespace ditattn::cli {
namespace {

using parallel::Communicator;
using parallel::Seconds;
using World = std::shared_ptr<Communicator>;

constexpr std::int64_t kMostThreads = 64;

// Open MPI, MPICH and Intel MPI, PMIx (Slurm).
constexpr const char* kLaunchers[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"};

// Opened, not linked: the command starts where there is no MPI, and one build serves both.
decltype(&ditattn_run_mpi_job) open_mpi() {
  Dl_info here{};
  ::dladdr(reinterpret_cast<const void*>(&ditattn_command), &here);
  const std::string file = std::filesystem::path(here.dli_fname).replace_filename("libditattn_mpi.so").string();
  void* library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: MPI does not end twice
  void* function = library == nullptr ? nullptr : ::dlsym(library, parallel::kRunMpiJob);
  if (function == nullptr) {
    throw ImportError(fmt::format(
        "An MPI launcher started this process, but the MPI transport cannot be loaded: {}. It is built where "
        "CMake finds MPI (scripts/setup.sh mpi). Without a launcher, --parallel runs ranks as threads.",
        ::dlerror()));
  }
  return reinterpret_cast<decltype(&ditattn_run_mpi_job)>(function);
}

// The other ranks' warnings are rank 0's.
void log_errors_only() {
  set_log_handler([](LogLevel level, std::string_view message) {
    if (level == LogLevel::error) print_error(message);
  });
}

// Every process tells how its preparation ended. Of failures the first rank's is printed, once; all return its status.
ExitStatus agree(Communicator& world, const Failure& mine) {
  std::vector<ExitStatus> all(static_cast<std::size_t>(world.size()));
  world.all_gather(&mine.status, all.data(), std::vector<std::int64_t>(all.size(), sizeof(ExitStatus)))->wait();
  const auto first = std::ranges::find_if(all, [](ExitStatus status) { return status != kDone; });
  if (first == all.end()) return kDone;
  if (first - all.begin() == world.rank()) {
    print_error(world.rank() == 0 ? mine.message : fmt::format("rank {}: {}", world.rank(), mine.message));
  }
  return *first;
}

int run_as_process(const World& world, const std::function<void()>& prepare, const RankBody& body) {
  try {
    if (world->rank() != 0) log_errors_only();
    Failure failure{kDone, {}};
    try {
      prepare();
    } catch (...) {
      failure = current_failure();
    }
    if (const ExitStatus status = agree(*world, failure); status != kDone) return status;
    return body(world);
  } catch (...) {  // what leaves the session would end the job without a word
    const Failure failure = current_failure();
    world->abort(failure.message);
    return failure.status;
  }
}

}  // namespace

bool is_mpi_job() {
  return std::ranges::any_of(kLaunchers, [](const char* name) { return std::getenv(name) != nullptr; });
}

parallel::Mesh parse_degrees(const std::string& text) {
  try {
    return parallel::parse_mesh(text);
  } catch (const ValueError& error) {
    throw UsageError("--parallel: " + error.message());
  }
}

World device_communicator(const World& over, DLDevice device) {
  if (device.device_type == kDLCPU) return over;
  throw NotImplementedError(
      fmt::format("--parallel computes on CPUs only, got {}. Use --device cpu; for GPUs there is the program "
                  "ditattn_gpu_parallel (docs/parallel.md).",
                  device_name(device)));
}

int run_as_ranks(const parallel::Mesh& mesh, Seconds timeout, const std::function<void()>& prepare,
                 const RankBody& body) {
  if (is_mpi_job()) {
    const auto run = open_mpi();
    return run(timeout, [&](const World& world) { return run_as_process(world, prepare, body); });
  }
  std::int64_t ranks = 1;
  for (const int degree : {mesh.ulysses, mesh.ring, mesh.allgather}) ranks = std::min(ranks * degree, kMostThreads + 1);
  if (ranks > kMostThreads) {
    throw UsageError(
        fmt::format("--parallel: {} are more ranks than the {} that one process may have as threads. Use "
                    "smaller degrees, or processes: mpirun -n N ditattn …",
                    parallel::mesh_name(mesh), kMostThreads));
  }
  prepare();
  std::atomic<int> status{kDone};
  const auto run = [&](const World& world) {
    const int mine = body(world);
    if (world->rank() == 0) status = mine;
  };
  parallel::run_ranks(static_cast<int>(ranks), run, timeout);
  return status;
}

}  // namespace ditattn::cli
