#pragma once

/// The door of libditattn_mpi.so for programs that must start where there is no MPI: they open the library with dlopen
/// and look this one function up. Rejected: linking to it, which needs an MPI library at every start, and `MpiSession`
/// by its members' mangled names.

#include <functional>
#include <memory>

#include "ditattn/communicator.hpp"
#include "ditattn/export.hpp"

namespace ditattn::parallel {

using MpiJob = std::function<int(const std::shared_ptr<Communicator>& world)>;
inline constexpr const char* kRunMpiJob = "ditattn_run_mpi_job";

}  // namespace ditattn::parallel

/// Calls `job` within an `MpiSession` and returns what it returns.
extern "C" DITATTN_API int ditattn_run_mpi_job(ditattn::parallel::Seconds timeout,
                                               const ditattn::parallel::MpiJob& job);
