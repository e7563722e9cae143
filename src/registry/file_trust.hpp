#pragma once

#include <filesystem>
#include <string>

namespace ditattn {

/// Why others than root and the effective user could change what the absolute path leads to, and what to do about it;
/// empty where they could not, or where nothing is there. Every directory on the way counts and every symbolic link is
/// followed, wherever it leads: each part belongs to root or to the effective user, and neither everybody nor a group
/// may write to it. Two exceptions: a group that has its owner's name and no other member (the user-private groups of
/// Debian, Fedora and others, where files are 0664), and the sticky bit, as /tmp has it, of directories that are passed
/// on the way: it keeps others from renaming, not from adding names to the last one.
///
/// Thread-safe. What is trusted stays so until root or the user change it: nobody else can between this and dlopen.
std::string reason_not_trusted(const std::filesystem::path& path);

}  // namespace ditattn
