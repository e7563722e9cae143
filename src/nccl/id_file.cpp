#include "nccl/id_file.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <thread>
#include <utility>

namespace ditattn::parallel {

IdFile::IdFile(std::filesystem::path file, const NcclId& id) : file_(std::move(file)), id_(id) {
  const std::string draft = fmt::format("{}.{}", file_.string(), ::getpid());
  std::ofstream stream(draft, std::ios::binary);
  stream.write(id.data(), static_cast<std::streamsize>(id.size()));
  stream.close();
  const std::string unwritten = stream ? "" : std::strerror(errno);
  std::error_code error;
  if (unwritten.empty()) std::filesystem::create_hard_link(draft, file_, error);
  std::error_code ignored;
  std::filesystem::remove(draft, ignored);
  if (!unwritten.empty()) {
    throw FileError(fmt::format("The id of the ranks cannot be written to {}: {}", draft, unwritten));
  }
  if (error) {
    throw FileError(fmt::format("The id of the ranks cannot be written to {}: {}. Name a file that is not there.",
                                file_.string(), error.message()));
  }
}

IdFile::~IdFile() {
  std::error_code ignored;
  std::filesystem::remove(file_, ignored);
}

NcclId read_id(const std::filesystem::path& file, Seconds timeout) {
  for (const auto start = std::chrono::steady_clock::now(); std::chrono::steady_clock::now() - start < timeout;) {
    NcclId id{};
    if (std::ifstream(file, std::ios::binary).read(id.data(), static_cast<std::streamsize>(id.size()))) return id;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  throw TimeoutError(fmt::format("parallel: rank 0 did not write {} within {} s: it is lost or late.", file.string(),
                                 timeout.count()));
}

}  // namespace ditattn::parallel
