#include "core/atomic_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>

#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;

// Has the file's content on the disk before its name is: after a crash there is the old file or the new one.
bool sync_to_disk(const fs::path& file) {
  const int descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return false;
  const bool done = ::fsync(descriptor) == 0;
  ::close(descriptor);
  return done;
}

}  // namespace

void write_atomically(const fs::path& file, const char* what, const std::function<void(std::ostream&)>& content) {
  static std::atomic<int> writes{0};  // two threads may write one file
  const fs::path aside = file.string() + fmt::format(".{}.{}.partial", ::getpid(), writes++);
  const auto fail = [&](const std::string& reason) {
    std::error_code ignored;
    fs::remove(aside, ignored);
    throw FileError(fmt::format("Cannot write {} '{}': {}.", what, file.string(), reason));
  };
  std::ofstream stream(aside, std::ios::binary);
  if (!stream) fail(std::strerror(errno));
  content(stream);
  stream.close();
  if (!stream || !sync_to_disk(aside)) fail(std::strerror(errno));
  std::error_code error;
  fs::rename(aside, file, error);
  if (error) fail(error.message());
}

}  // namespace ditattn
