#include "core/cpu_name.hpp"

#include <sys/utsname.h>

#include <fstream>

namespace ditattn {

std::string cpu_name() {
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line);) {
    if (!line.starts_with("model name")) continue;
    const std::size_t begin = line.find_first_not_of(" \t", line.find(':') + 1);
    if (begin != std::string::npos) return line.substr(begin);
  }
  utsname system{};
  ::uname(&system);
  return system.machine;
}

}  // namespace ditattn
