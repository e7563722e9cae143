#include "core/atomic_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

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

// The file that is being written. Whatever is thrown meanwhile, it is gone afterwards, unless it was renamed.
class Aside {
 public:
  explicit Aside(fs::path path) : path_(std::move(path)) {}
  ~Aside() { ::unlink(path_.c_str()); }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;
  [[nodiscard]] const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace

void write_atomically(const fs::path& file, const char* what, const std::function<void(std::ostream&)>& content) {
  static std::atomic<int> writes{0};  // two threads may write one file
  const Aside aside(file.string() + fmt::format(".{}.{}.partial", ::getpid(), writes++));
  const auto fail = [&](const std::string& reason) {
    throw FileError(fmt::format("Cannot write {} '{}': {}.", what, file.string(), reason));
  };
  std::ofstream stream(aside.path(), std::ios::binary);
  if (!stream) fail(std::strerror(errno));
  content(stream);
  stream.close();
  if (!stream || !sync_to_disk(aside.path())) fail(std::strerror(errno));
  std::error_code error;
  fs::rename(aside.path(), file, error);
  if (error) fail(error.message());
}

}  // namespace ditattn
