#pragma once

/// GPUs as ranks, over NCCL. In a library of its own, `ditattn_nccl`, built with the GPU back ends; it opens
/// `libnccl.so.2` when first asked.

#include <array>
#include <filesystem>
#include <memory>

#include "ditattn/communicator.hpp"
#include "ditattn/export.hpp"

namespace ditattn::parallel {

/// What ranks must have in common to find each other: made by one, brought to the others by any means (a file, a
/// store).
using NcclId = std::array<char, 128>;

/// A new one. ImportError where there is no NCCL, with where it was looked for.
DITATTN_API NcclId nccl_id();

/// Joins `size` ranks with the same `id`, this one with GPU `device`. Called by all of them; each rank is a process
/// with a GPU of its own (several in one process were not got to work: they have been seen to hang). Its `takes` says
/// yes to that GPU's memory and to host memory, which goes through the GPU, so the host waits for that. Operations
/// on the GPU's memory go on a stream of their own and may be captured into a CUDA graph. Between GPUs of one host copy
/// engines carry what is received in `receive_memory`, where they can (DITATTN_PEER_COPIES, docs/environment.md);
/// `start` waits then for the others to call it too. Not so by an `ncclComm_t` of the program's.
///
/// A rank that does not come within `timeout` is a TimeoutError: here, and in operations at the next use of the
/// communicator, because the host does not wait for these; a thread watches them, and ends what waits on the GPU.
/// ValueError: a rank that is not below `size`, a GPU that is not there, two ranks of one GPU.
DITATTN_API std::shared_ptr<Communicator> nccl_communicator(const NcclId& id, int rank, int size, int device,
                                                            Seconds timeout = kDefaultTimeout);

/// The same ranks as `over` (MPI), which brings the id to them and its timeout.
DITATTN_API std::shared_ptr<Communicator> nccl_communicator(const std::shared_ptr<Communicator>& over, int device);

/// The same by a file that all ranks see, and that is not there before: rank 0 writes the id into it, and removes it
/// when all have come. FileError where there is one already, or it cannot be written.
DITATTN_API std::shared_ptr<Communicator> nccl_communicator(const std::filesystem::path& file, int rank, int size,
                                                            int device, Seconds timeout = kDefaultTimeout);

/// The ranks of an `ncclComm_t` that the program has, and keeps: it is split once, here, with no operation of it under
/// way, and not used later. Where a rank does not come to that, it is aborted.
DITATTN_API std::shared_ptr<Communicator> nccl_communicator(void* nccl_comm, Seconds timeout = kDefaultTimeout);

}  // namespace ditattn::parallel
