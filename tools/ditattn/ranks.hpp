#pragma once

/// Who the ranks of a command are: threads of this process, or the processes that an MPI launcher started.

#include <functional>
#include <memory>
#include <string>

#include "ditattn/communicator.hpp"
#include "ditattn/parallel.hpp"

namespace ditattn::cli {

/// Whether a launcher (mpirun, mpiexec, srun) started this process as one of a job.
bool is_mpi_job();

/// `--parallel`'s degrees; UsageError for what is none, with what is allowed.
parallel::Mesh parse_degrees(const std::string& text);

/// The seat of the transports of devices: the communicator over which ranks exchange tensors of `device`, made from the
/// one that brings them together. For the CPU that one itself. For GPUs, a process for each: `nccl_communicator(over,
/// device.device_id)` of ditattn/nccl.hpp, from libditattn_nccl.so, with each process' own GPU; not used here yet:
/// NotImplementedError.
std::shared_ptr<parallel::Communicator> device_communicator(const std::shared_ptr<parallel::Communicator>& over,
                                                            DLDevice device);

/// A rank's part of a command; returns the exit status.
using RankBody = std::function<int(const std::shared_ptr<parallel::Communicator>& world)>;

/// Runs `body` as every rank of `mesh`, and returns rank 0's status. `prepare` is called before, once in each process,
/// for what needs no other rank: where it fails in one process, no body is called anywhere. UsageError where a process
/// would have too many ranks, ImportError where there is no MPI transport. What a body throws ends all ranks: as
/// threads it is thrown here; an MPI process prints it, and the job ends with a status that is not 0.
int run_as_ranks(const parallel::Mesh& mesh, parallel::Seconds timeout, const std::function<void()>& prepare,
                 const RankBody& body);

}  // namespace ditattn::cli
