// MPI as a transport: point-to-point messages of bytes, polled until a deadline.

#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <exception>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "ditattn/log.hpp"
#include "ditattn/mpi.hpp"
#include "parallel/mpi_job.hpp"
#include "parallel/timeout.hpp"

namespace ditattn::parallel {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kLongestMessage = 1 << 30;  // counts are ints

// Whether some operation of this process failed: ending MPI in order would then wait for ever.
bool& has_failed() {
  static bool failed = false;
  return failed;
}

[[noreturn]] void fail(const std::string& text) {
  has_failed() = true;
  throw CommunicationError("parallel: " + text + ".");
}

void check(int code, std::string_view what) {
  if (code == MPI_SUCCESS) return;
  std::string text(MPI_MAX_ERROR_STRING, '\0');
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  fail(fmt::format("{}: {}", what, text.substr(0, static_cast<std::size_t>(length))));
}

// Asks `done` until it says yes; false after `timeout`. Sleeps after a while: where ranks outnumber cores, a rank that
// yields instead waits for a whole time slice of another.
template <class Done>
bool poll(Seconds timeout, const Done& done) {
  const auto start = Clock::now();
  while (!done()) {
    const auto waited = Clock::now() - start;
    if (waited > timeout) return false;
    if (waited > std::chrono::microseconds(50)) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

struct Transfer {
  MPI_Request request = MPI_REQUEST_NULL;
  int rank = 0;
  int expected = -1;  // bytes to receive; −1: it is sent
};

class MpiPending final : public Pending {
 public:
  MpiPending(Operation operation, Seconds timeout, int rank, std::vector<Transfer> transfers)
      : operation_(operation), timeout_(timeout), rank_(rank), transfers_(std::move(transfers)) {}

  // Given up: what has not come may be dropped.
  ~MpiPending() override {
    for (Transfer& transfer : transfers_) {
      if (transfer.request == MPI_REQUEST_NULL) continue;
      has_failed() = true;
      MPI_Cancel(&transfer.request);
      MPI_Request_free(&transfer.request);
    }
  }
  MpiPending(const MpiPending&) = delete;
  MpiPending& operator=(const MpiPending&) = delete;

  void wait() override {
    for (Transfer& transfer : transfers_) {
      MPI_Status status;
      const bool came = poll(timeout_, [&] {
        int done = 0;
        check(MPI_Test(&transfer.request, &done, &status), operation_name(operation_));
        return done != 0;
      });
      if (!came) {
        has_failed() = true;
        throw TimeoutError(
            fmt::format("parallel: rank {} did not come within {} s: it is lost or late (rank {} waits in {}).",
                        transfer.rank, timeout_.count(), rank_, operation_name(operation_)));
      }
      check_size(transfer, status);
    }
  }

 private:
  void check_size(const Transfer& transfer, const MPI_Status& status) const {
    int bytes = 0;
    if (transfer.expected < 0) return;
    check(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count");
    if (bytes == transfer.expected) return;
    fail(fmt::format("rank {} expects {} bytes by {}, rank {} sent {}", rank_, transfer.expected,
                     operation_name(operation_), transfer.rank, bytes));
  }

  Operation operation_;
  Seconds timeout_;
  int rank_;
  std::vector<Transfer> transfers_;
};

// MPI aborts the program where something is asked of it after its end.
void check_running() {
  int ended = 0;
  MPI_Finalized(&ended);
  if (ended == 0) return;
  throw CommunicationError(
      "parallel: MPI has ended in this process, and does not begin again. Keep one session around all that uses it.");
}

class MpiCommunicator final : public Communicator {
 public:
  // Takes `handle` over.
  MpiCommunicator(MPI_Comm handle, int rank, int size, Seconds timeout)
      : Communicator(rank, size, timeout), handle_(handle) {
    MPI_Comm_set_errhandler(handle_, MPI_ERRORS_RETURN);
  }
  ~MpiCommunicator() override {
    int ended = 0;
    MPI_Finalized(&ended);
    if (ended == 0 && !has_failed()) MPI_Comm_free(&handle_);  // waits for the others
  }
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  std::unique_ptr<Pending> start(Operation operation, std::span<const SendBlock> sends,
                                 std::span<const ReceiveBlock> receives, DLDevice device) override {
    if (!takes(device)) throw NotImplementedError("Ranks that are MPI processes exchange host memory only.");
    check_running();
    const int tag = static_cast<int>(operation);
    std::vector<Transfer> transfers;
    for (const ReceiveBlock& block : receives) {
      for (std::int64_t at = 0; at < block.bytes; at += kLongestMessage) {
        const auto bytes = static_cast<int>(std::min(kLongestMessage, block.bytes - at));
        Transfer& transfer = transfers.emplace_back(Transfer{.rank = block.rank, .expected = bytes});
        check(MPI_Irecv(static_cast<char*>(block.data) + at, bytes, MPI_BYTE, block.rank, tag, handle_,
                        &transfer.request),
              "MPI_Irecv");
      }
    }
    for (const SendBlock& block : sends) {
      for (std::int64_t at = 0; at < block.bytes; at += kLongestMessage) {
        const auto bytes = static_cast<int>(std::min(kLongestMessage, block.bytes - at));
        Transfer& transfer = transfers.emplace_back(Transfer{.rank = block.rank});
        check(MPI_Isend(static_cast<const char*>(block.data) + at, bytes, MPI_BYTE, block.rank, tag, handle_,
                        &transfer.request),
              "MPI_Isend");
      }
    }
    return std::make_unique<MpiPending>(operation, timeout(), rank(), std::move(transfers));
  }

  std::shared_ptr<Communicator> split(int colour, int key) override {
    barrier();  // MPI's split knows no timeout: whoever does not come is missed here
    MPI_Comm part = MPI_COMM_NULL;
    check(MPI_Comm_split(handle_, colour, key, &part), "MPI_Comm_split");
    return of(part, timeout());
  }

  // Not MPI_Abort: the error on its way tells more, and the session ends the job after it.
  void abort(const std::string& reason) noexcept override {
    has_failed() = true;
    log(LogLevel::error, fmt::format("parallel: rank {} failed: {}", rank(), reason));
  }

  static std::shared_ptr<Communicator> of(MPI_Comm handle, Seconds timeout) {
    int rank = 0;
    int size = 0;
    check(MPI_Comm_rank(handle, &rank), "MPI_Comm_rank");
    check(MPI_Comm_size(handle, &size), "MPI_Comm_size");
    return std::make_shared<MpiCommunicator>(handle, rank, size, timeout);
  }

 private:
  MPI_Comm handle_;
};

std::shared_ptr<Communicator> duplicate(MPI_Comm original, Seconds timeout) {
  check_timeout(timeout);
  MPI_Comm copy = MPI_COMM_NULL;
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Comm_idup(original, &copy, &request), "MPI_Comm_idup");
  const bool came = poll(timeout, [&] {
    int done = 0;
    check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Comm_idup");
    return done != 0;
  });
  if (came) return MpiCommunicator::of(copy, timeout);
  has_failed() = true;
  throw TimeoutError(fmt::format("parallel: not all MPI processes came within {} s.", timeout.count()));
}

}  // namespace

MpiSession::MpiSession(Seconds timeout) : exceptions_(std::uncaught_exceptions()) {
  check_running();
  int begun = 0;
  MPI_Initialized(&begun);
  if (begun == 0) {
    int level = 0;
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level), "MPI_Init_thread");
    began_ = true;
  }
  world_ = duplicate(MPI_COMM_WORLD, timeout);
}

MpiSession::~MpiSession() {
  const bool failed = has_failed() || std::uncaught_exceptions() > exceptions_;
  if (failed) {
    MPI_Abort(MPI_COMM_WORLD, 1);
    return;
  }
  world_.reset();
  if (began_) MPI_Finalize();
}

std::shared_ptr<Communicator> mpi_communicator(int fortran_handle, Seconds timeout) {
  check_running();
  return duplicate(MPI_Comm_f2c(fortran_handle), timeout);
}

}  // namespace ditattn::parallel

int ditattn_run_mpi_job(ditattn::parallel::Seconds timeout, const ditattn::parallel::MpiJob& job) {
  const ditattn::parallel::MpiSession session(timeout);
  return job(session.world());
}
