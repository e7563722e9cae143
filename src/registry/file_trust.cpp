// Who may change a file: every part of its path is looked at, from the root on, as it is walked.
//
// The file is then opened by its name. Rejected: dlopen of /proc/self/fd/N, the very file that was looked at; $ORIGIN
// in its run path would be /proc/self/fd, and debuggers, dladdr and error texts would name that. Names that only root
// and the user can change need no such thing.

#include "registry/file_trust.hpp"

#include <fmt/format.h>
#include <grp.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string_view>
#include <vector>

namespace ditattn {
namespace {

namespace fs = std::filesystem;

constexpr int kMostLinks = 40;  // as the kernel follows

// An entry of the user or group database, which may have to ask a server.
template <class Entry, class Id>
class Account {
 public:
  Account(int (*find)(Id, Entry*, char*, std::size_t, Entry**), Id id) : buffer_(std::size_t{1} << 16) {
    find(id, &entry_, buffer_.data(), buffer_.size(), &found_);  // what has more members than fit counts as unknown
  }
  const Entry* get() const { return found_; }

 private:
  std::vector<char> buffer_;
  Entry entry_{};
  Entry* found_ = nullptr;
};
using User = Account<passwd, uid_t>;
using Group = Account<group, gid_t>;

std::string user_text(uid_t id) {
  const User user(::getpwuid_r, id);
  return user.get() == nullptr ? fmt::format("user {}", id) : fmt::format("user {} ({})", id, user.get()->pw_name);
}

std::string group_text(gid_t id) {
  const Group group(::getgrgid_r, id);
  return group.get() == nullptr ? fmt::format("group {}", id) : fmt::format("group {} ({})", id, group.get()->gr_name);
}

bool is_private_group(gid_t id, uid_t owner) {
  const User user(::getpwuid_r, owner);
  const Group group(::getgrgid_r, id);
  if (user.get() == nullptr || group.get() == nullptr) return false;
  const std::string_view name = user.get()->pw_name;
  if (name != group.get()->gr_name) return false;
  for (char** member = group.get()->gr_mem; *member != nullptr; ++member) {
    if (name != *member) return false;
  }
  return true;
}

std::string describe(const fs::path& path, const struct stat& status) {
  return fmt::format("'{}' (mode {:04o}, {}, {})", path.string(), status.st_mode & 07777, user_text(status.st_uid),
                     group_text(status.st_gid));
}

// What is wrong with one part of a path; empty if nothing is.
std::string problem_of(const fs::path& path, const struct stat& status, bool sticky_protects) {
  const uid_t self = ::geteuid();
  if (status.st_uid != 0 && status.st_uid != self) {
    return fmt::format(
        "{} belongs neither to root nor to {}, as whom this process runs. Plug-ins are code: copy them to a folder of "
        "your own, or change the owner (chown)",
        describe(path, status), user_text(self));
  }
  if (S_ISLNK(status.st_mode)) return {};  // has no mode of its own
  if (sticky_protects && S_ISDIR(status.st_mode) && (status.st_mode & S_ISVTX) != 0) return {};
  if ((status.st_mode & S_IWOTH) != 0) {
    return fmt::format("everybody may write to {}. Plug-ins are code: chmod o-w '{}'", describe(path, status),
                       path.string());
  }
  if ((status.st_mode & S_IWGRP) != 0 && !is_private_group(status.st_gid, status.st_uid)) {
    return fmt::format("a group may write to {}. Plug-ins are code: chmod g-w '{}'", describe(path, status),
                       path.string());
  }
  return {};
}

class Walk {
 public:
  // `path` is absolute; what it leads to is left in `at_`.
  std::string follow(const fs::path& path) {
    at_ = "/";
    if (std::string problem = look(); !problem.empty()) return problem;
    for (const fs::path& part : path.relative_path()) {
      if (is_missing_) break;
      if (part == "..") {
        at_ = at_.parent_path();  // no link: those were followed
      } else if (!part.empty() && part != ".") {
        at_ /= part;
        if (std::string problem = look(); !problem.empty()) return problem;
      }
    }
    return {};
  }

  // What it led to, without the sticky bit's excuse.
  [[nodiscard]] std::string problem_at_end() const {
    struct stat status {};
    return is_missing_ || ::lstat(at_.c_str(), &status) != 0 ? std::string() : problem_of(at_, status, false);
  }

 private:
  std::string look() {
    struct stat status {};
    is_missing_ = ::lstat(at_.c_str(), &status) != 0;
    if (is_missing_) return {};  // whoever opens it is told why
    if (std::string problem = problem_of(at_, status, true); !problem.empty()) return problem;
    if (!S_ISLNK(status.st_mode)) return {};
    std::error_code error;
    const fs::path target = fs::read_symlink(at_, error);
    is_missing_ = error || ++links_ > kMostLinks;
    return is_missing_ ? std::string() : follow(at_.parent_path() / target);
  }

  fs::path at_;
  bool is_missing_ = false;
  int links_ = 0;
};

}  // namespace

std::string reason_not_trusted(const fs::path& path) {
  Walk walk;
  std::string problem = walk.follow(path);
  return problem.empty() ? walk.problem_at_end() : problem;
}

}  // namespace ditattn
