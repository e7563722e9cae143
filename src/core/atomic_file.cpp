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

// The file that is being written. It has no name until it is whole, so that whatever ends the process leaves no part of
// it; where there are no such files (NFS, FUSE) or no /proc, it has one, and goes unless the process is killed.
class Aside {
 public:
  explicit Aside(fs::path path) : path_(std::move(path)) {}
  ~Aside() {
    if (descriptor_ >= 0) ::close(descriptor_);
    ::unlink(path_.c_str());
  }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;

  // False here and below: errno says why.
  bool open() {
    const fs::path folder = path_.has_parent_path() ? path_.parent_path() : ".";
    descriptor_ = ::open(folder.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
    if (descriptor_ >= 0) stream_.open(itself(), std::ios::binary);
    if (stream_.is_open()) return true;
    if (descriptor_ >= 0) ::close(descriptor_);
    is_named_ = true;
    stream_.open(path_, std::ios::binary);
    descriptor_ = stream_.is_open() ? ::open(path_.c_str(), O_RDONLY | O_CLOEXEC) : -1;
    return descriptor_ >= 0;
  }
  [[nodiscard]] std::ostream& stream() { return stream_; }

  // The content is on the disk before the name is: after a crash there is the old file or the new one.
  bool move_to(const fs::path& file) {
    stream_.close();
    if (!stream_ || ::fsync(descriptor_) != 0 || !name()) return false;
    return ::rename(path_.c_str(), file.c_str()) == 0;
  }

 private:
  [[nodiscard]] std::string itself() const { return fmt::format("/proc/self/fd/{}", descriptor_); }
  [[nodiscard]] bool name() const {
    if (is_named_) return true;
    ::unlink(path_.c_str());  // somebody with the same process number may have been killed here
    return ::linkat(AT_FDCWD, itself().c_str(), AT_FDCWD, path_.c_str(), AT_SYMLINK_FOLLOW) == 0;
  }

  fs::path path_;
  int descriptor_ = -1;
  bool is_named_ = false;
  std::ofstream stream_;
};

}  // namespace

void write_atomically(const fs::path& file, const char* what, const std::function<void(std::ostream&)>& content) {
  static std::atomic<int> writes{0};  // two threads may write one file
  Aside aside(file.string() + fmt::format(".{}.{}.partial", ::getpid(), writes++));
  const auto fail = [&] {
    throw FileError(fmt::format("Cannot write {} '{}': {}.", what, file.string(), std::strerror(errno)));
  };
  if (!aside.open()) fail();
  content(aside.stream());
  if (!aside.move_to(file)) fail();
}

}  // namespace ditattn
