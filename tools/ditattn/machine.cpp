#include "tools/ditattn/machine.hpp"

#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>

#include "core/cpu_name.hpp"
#include "core/environment.hpp"
#include "ditattn/version.hpp"
#include "kernels/cpu/cpu_level.hpp"

namespace ditattn::cli {
namespace {

// The value of the first line of `file` that starts with `key`, after the separator; empty without one.
std::string value_in(const char* file, const std::string& key, char separator) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    if (!line.starts_with(key)) continue;
    std::string value = line.substr(std::min(line.find(separator), line.size() - 1) + 1);
    std::erase(value, '"');
    return value.substr(std::min(value.find_first_not_of(" \t"), value.size()));
  }
  return {};
}

}  // namespace

std::vector<std::string> cpu_features() {
  std::string flags = value_in("/proc/cpuinfo", "flags", ':');
  if (flags.empty()) flags = value_in("/proc/cpuinfo", "Features", ':');  // Arm
  std::istringstream stream(flags);
  return {std::istream_iterator<std::string>(stream), {}};
}

Machine this_machine(int threads) {
  utsname system{};
  ::uname(&system);
  Machine machine;
  machine.cpu = cpu_name();
  machine.threads = threads;
  machine.memory_gb =
      static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGESIZE)) / 1e9;
  const std::string distribution = value_in("/etc/os-release", "PRETTY_NAME", '=');
  machine.os = fmt::format("{}{}{} {}, {}", distribution, distribution.empty() ? "" : ", ", system.sysname,
                           system.release, system.machine);
  return machine;
}

Json to_json(const Machine& machine) {
  return {{"cpu", machine.cpu},
          {"threads", machine.threads},
          {"memory_gb", machine.memory_gb},
          {"os", machine.os},
          {"ditattn", DITATTN_VERSION}};
}

std::span<const char* const> cpu_levels() {
  return std::span(kernels::cpu::kCpuLevelNames).first(static_cast<std::size_t>(kernels::cpu::detect_cpu_level()) + 1);
}

std::string cpu_level_in_effect() {
  const std::string wanted = environment(Env::DITATTN_CPU_LEVEL).value_or(cpu_levels().back());
  return std::ranges::find(cpu_levels(), wanted) != cpu_levels().end() ? wanted : "";
}

std::string describe(const Machine& machine) {
  return fmt::format("{}, {} thread{}, {:.0f} GB; {}; ditattn {}", machine.cpu, machine.threads,
                     machine.threads == 1 ? "" : "s", machine.memory_gb, machine.os, DITATTN_VERSION);
}

}  // namespace ditattn::cli
