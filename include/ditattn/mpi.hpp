#pragma once

/// Processes of an MPI job as ranks. In a library of its own, `ditattn_mpi`, built where there is MPI; nothing else
/// links to MPI.

#include <memory>

#include "ditattn/communicator.hpp"
#include "ditattn/export.hpp"

namespace ditattn::parallel {

/// MPI for as long as the object lives, in one thread of a process: begins it unless the program has, and ends what it
/// began. Where an operation failed, or an exception leaves the object's scope, the whole job ends there and then with
/// status 1, because the other processes would wait for this one: report errors inside the scope.
///
///     int main() {
///       const MpiSession mpi;
///       const auto group = std::make_shared<ParallelGroup>(mpi.world(), Mesh{.ulysses = 2, .ring = 2});
class DITATTN_API MpiSession {
 public:
  /// Called by all processes. TimeoutError where one of them does not come.
  explicit MpiSession(Seconds timeout = kDefaultTimeout);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  /// All processes. Communicators must be gone before the session.
  [[nodiscard]] const std::shared_ptr<Communicator>& world() const { return world_; }

 private:
  bool began_ = false;
  int exceptions_ = 0;
  std::shared_ptr<Communicator> world_;
};

/// The processes of a communicator that the program has, by `MPI_Comm_c2f`; it is duplicated, so that messages do not
/// mix. Called by all of them.
DITATTN_API std::shared_ptr<Communicator> mpi_communicator(int fortran_handle, Seconds timeout = kDefaultTimeout);

}  // namespace ditattn::parallel
