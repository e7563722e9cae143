// What `ditattn doctor` finds out, one function per part of its document.

#include "tools/ditattn/diagnosis.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "core/environment.hpp"
#include "core/text.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/launches.hpp"
#include "ditattn/selector.hpp"
#include "ditattn/threads.hpp"
#include "ditattn/tuner.hpp"
#include "ditattn/version.hpp"
#include "registry/search_path.hpp"
#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/libraries.hpp"
#include "tools/ditattn/machine.hpp"
#include "tools/ditattn/remedies.hpp"

namespace ditattn::cli {
namespace {

namespace fs = std::filesystem;

// What kernels may use, now or later, under the names of /proc/cpuinfo.
constexpr const char* kFeaturesThatMatter[] = {"sse2",     "avx2",     "fma",         "avx512f",
                                               "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni",
                                               "amx_tile", "amx_bf16", "amx_int8"};

constexpr const char* kNoBackend = "no available back end computes on it";

Json null_if_empty(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

bool is_directory(const fs::path& path) {
  std::error_code error;
  return fs::is_directory(path, error);
}

bool exists(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error);
}

// What is wrong with DITATTN_NUM_THREADS; empty if nothing.
std::string thread_count_problem() {
  try {
    num_threads();
    return {};
  } catch (const ValueError& error) {
    return error.message();
  }
}

Json machine_part() {
  const bool threads_known = thread_count_problem().empty();
  Json machine = to_json(this_machine(threads_known ? num_threads() : 0));
  if (!threads_known) machine["threads"] = nullptr;
  const std::vector<std::string> features = cpu_features();
  Json matter = Json::object();
  for (const char* feature : kFeaturesThatMatter) {
    matter[feature] = std::ranges::find(features, feature) != features.end();
  }
  machine["cpu_features"] = std::move(matter);
  machine["best_cpu_level"] = cpu_levels().back();
  machine["cpu_level"] = null_if_empty(cpu_level_in_effect());
  return machine;
}

Json library_part() {
  Dl_info library{};
  ::dladdr(reinterpret_cast<const void*>(&plugin_search_path), &library);
  std::error_code error;
  const fs::path file = library.dli_fname != nullptr ? fs::canonical(library.dli_fname, error) : fs::path();
  Json search_path = Json::array();
  for (const std::string& directory : plugin_search_path()) {
    search_path.push_back({{"directory", directory}, {"exists", is_directory(directory)}});
  }
  Json ignored = Json::array();
  for (const auto& [entry, reason] : ignored_search_path_entries()) {
    ignored.push_back({{"entry", entry}, {"reason", reason}});
  }
  return {{"version", DITATTN_VERSION},
          {"interface_version", DITATTN_INTERFACE_VERSION},
          {"file", file.string()},
          {"search_path", std::move(search_path)},
          {"ignored", std::move(ignored)}};
}

// The back end that the environment names, as far as it makes sense.
struct ExplicitChoice {
  std::string value;                  // as written; empty: none
  const BackendInfo* info = nullptr;  // null: no such member
  std::string problem;                // why it cannot be followed; empty if it can
};

ExplicitChoice explicit_choice(const std::vector<BackendInfo>& backends) {
  const std::string value = environment(Env::DIFFUSION_ATTENTION_BACKEND).value_or("");
  if (value.empty() || upper_case(value) == "AUTO") return {};
  ExplicitChoice choice{.value = value, .info = nullptr, .problem = {}};
  try {
    const auto member = DiffusionAttentionBackendEnum::from_name(upper_case(value));
    choice.info = &*std::ranges::find(backends, member, &BackendInfo::member);
    if (!choice.info->available) choice.problem = choice.info->reason;
  } catch (const ValueError& error) {
    choice.problem = error.message();
  }
  return choice;
}

std::string backend_note(const std::vector<BackendInfo>& backends) {
  const ExplicitChoice choice = explicit_choice(backends);
  if (choice.info == nullptr || choice.info->available) return choice.problem;
  return fmt::format("{} is not available here: what leaves the choice to the environment fails.",
                     choice.info->member.name());
}

std::string plugin_path_note() {
  std::vector<std::string> notes;
  for (const auto& [entry, reason] : ignored_search_path_entries()) {
    notes.push_back(fmt::format("'{}' is ignored, because {}.", entry, reason));
  }
  const std::vector<std::string> directories = plugin_search_path();
  for (std::size_t i = 1; i < directories.size(); ++i) {  // the first is the installed one
    if (!is_directory(directories[i])) notes.push_back(fmt::format("'{}' is no directory.", directories[i]));
  }
  return fmt::format("{}", fmt::join(notes, " "));
}

std::string cpu_level_note() {
  if (!cpu_level_in_effect().empty()) return {};
  return fmt::format("'{}' is not a level this CPU has. Valid here: {}.",
                     environment(Env::DITATTN_CPU_LEVEL).value_or(""), fmt::join(cpu_levels(), ", "));
}

std::string gpu_level_note() {
  constexpr std::array levels{"75", "80", "89", "90"};
  const std::string value = environment(Env::DITATTN_GPU_LEVEL).value_or("");
  if (std::ranges::count(levels, value) != 0) return {};
  return fmt::format("'{}' is not one of {}.", value, fmt::join(levels, ", "));
}

// What is wrong with the variables of tuning, if anything.
std::string tuning_note() {
  try {
    tune_cache_file(kCpu);
    return {};
  } catch (const Error& error) {
    return error.message();
  }
}

std::string note_on(Env variable, const std::vector<BackendInfo>& backends) {
  switch (variable) {
    case Env::DIFFUSION_ATTENTION_BACKEND:
      return backend_note(backends);
    case Env::DITATTN_PLUGIN_PATH:
      return plugin_path_note();
    case Env::DITATTN_NUM_THREADS:
      return thread_count_problem();
    case Env::DITATTN_CPU_LEVEL:
      return cpu_level_note();
    case Env::DITATTN_GPU_LEVEL:
      return gpu_level_note();
    case Env::DITATTN_TUNE:
    case Env::DITATTN_TUNE_CACHE:
      return tuning_note();
  }
  return {};
}

Json environment_part(const std::vector<BackendInfo>& backends) {
  Json variables = Json::array();
  for (std::size_t i = 0; i < environment_variables().size(); ++i) {
    const Env variable = static_cast<Env>(i);
    const auto value = environment(variable);
    variables.push_back({{"name", environment_variables()[i].name},
                         {"value", value ? Json(*value) : Json(nullptr)},
                         {"note", value ? null_if_empty(note_on(variable, backends)) : Json(nullptr)}});
  }
  return variables;
}

Json libraries_part() {
  Json libraries = Json::array();
  for (const OptionalLibrary& library : optional_libraries()) {
    const Probe probe = probe_library(library.sonames);
    libraries.push_back({{"name", library.name},
                         {"sonames", library.sonames},
                         {"found", !probe.file.empty()},
                         {"file", null_if_empty(probe.file)},
                         {"reason", null_if_empty(probe.reason)},
                         {"purpose", library.purpose},
                         {"used_by", library.used_by},
                         {"install", library.install}});
  }
  return libraries;
}

// What the NVIDIA driver shows without being asked through CUDA: /dev/nvidia0, /dev/nvidia1, …
std::vector<std::string> nvidia_device_files() {
  std::vector<std::string> files;
  std::error_code error;
  for (fs::directory_iterator entry("/dev", error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const bool is_device = name.starts_with("nvidia") && name.size() > 6 &&
                           std::all_of(name.begin() + 6, name.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (is_device) files.push_back(entry->path().string());
  }
  std::ranges::sort(files);
  return files;
}

// Whether some back end that can be used here computes on the device.
bool is_usable(const std::string& device, const std::vector<BackendInfo>& backends) {
  return std::ranges::any_of(backends, [&](const BackendInfo& info) {
    return info.available && std::ranges::count(info.backend->capabilities().devices, device) > 0;
  });
}

Json cuda_device(const std::vector<BackendInfo>& backends) {
  constexpr const char* driver = "/proc/driver/nvidia";
  std::vector<std::string> evidence = nvidia_device_files();
  const bool present = !evidence.empty();
  if (exists(driver)) evidence.emplace_back(driver);
  for (const CudaDevice& device : cuda_info().devices) {
    evidence.push_back(fmt::format("{} (compute capability {}.{}, {} GiB)", device.name, device.compute_capability / 10,
                                   device.compute_capability % 10, device.memory_bytes >> 30));
  }
  const bool usable = present && is_usable("cuda", backends);
  std::string reason;
  if (!present) {
    reason = evidence.empty()
                 ? fmt::format("no NVIDIA device: neither /dev/nvidia0 nor {} exists", driver)
                 : fmt::format("{} exists, but /dev/nvidia0 does not: no device is passed in here", driver);
  } else if (!usable) {
    reason = kNoBackend;
  }
  return {{"name", "cuda"},
          {"present", present},
          {"usable", usable},
          {"reason", null_if_empty(reason)},
          {"evidence", std::move(evidence)}};
}

Json devices_part(const std::vector<BackendInfo>& backends) {
  const bool usable = is_usable("cpu", backends);
  Json cpu = {{"name", "cpu"},
              {"present", true},
              {"usable", usable},
              {"reason", usable ? Json(nullptr) : Json(kNoBackend)},
              {"evidence", Json::array()}};
  return Json::array({std::move(cpu), cuda_device(backends)});
}

Json backends_part(const std::vector<BackendInfo>& backends) {
  Json entries = Json::array();
  for (const BackendInfo& info : backends) {
    const std::string remedy =
        info.available
            ? ""
            : remedy_for({.member = info.member.name(), .class_path = info.class_path, .reason = info.reason});
    entries.push_back({{"name", info.member.name()},
                       {"class_path", info.class_path},
                       {"overridden", info.member.is_overridden()},
                       {"available", info.available},
                       {"engine", null_if_empty(info.engine())},
                       {"reason", null_if_empty(info.reason)},
                       {"remedy", null_if_empty(remedy)}});
  }
  return entries;
}

// What `tune` knows; null where a variable is wrong, which the environment's part tells.
Json tuned_on(DLDevice device) {
  try {
    return {{"problems", tuned_problems(device).size()}, {"file", null_if_empty(tune_cache_file(device))}};
  } catch (const ValueError&) {
    return nullptr;
  }
}

Json default_on(DLDevice on, const std::vector<BackendInfo>& backends) {
  const std::string device(device_type_name(on));
  Json candidates = Json::array();
  Json platform_default = nullptr;
  for (const DiffusionAttentionBackendEnum member : platform_candidates(device)) {
    const BackendInfo& info = *std::ranges::find(backends, member, &BackendInfo::member);
    candidates.push_back(
        {{"backend", member.name()}, {"accepted", info.available}, {"reason", null_if_empty(info.reason)}});
    if (info.available && platform_default.is_null()) platform_default = member.name();
  }
  const ExplicitChoice choice = explicit_choice(backends);
  Json explicit_setting = nullptr;
  Json in_effect = platform_default;
  if (!choice.value.empty()) {
    explicit_setting = {
        {"source", "DIFFUSION_ATTENTION_BACKEND"}, {"value", choice.value}, {"reason", null_if_empty(choice.problem)}};
    in_effect = choice.problem.empty() ? Json(choice.info->member.name()) : Json(nullptr);
  }
  return {{"device", device},
          {"candidates", std::move(candidates)},
          {"platform_default", std::move(platform_default)},
          {"explicit", std::move(explicit_setting)},
          {"in_effect", std::move(in_effect)},
          {"tuned", tuned_on(on)}};
}

Json defaults_part(const std::vector<BackendInfo>& backends) {
  Json defaults = Json::array({default_on(kCpu, backends)});
  if (!cuda_info().devices.empty()) defaults.push_back(default_on({kDLCUDA, 0}, backends));
  return defaults;
}

Json launches_part() {
  Json launches = Json::array();
  for (const LaunchCount& count : launch_counts()) {
    launches.push_back({{"role", count.role}, {"backend", count.backend}, {"calls", count.calls}});
  }
  return launches;
}

}  // namespace

Json diagnose() {
  std::vector<BackendInfo> backends;
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    backends.push_back(inspect(member));
  }
  return {{"machine", machine_part()},
          {"library", library_part()},
          {"environment", environment_part(backends)},
          {"libraries", libraries_part()},
          {"devices", devices_part(backends)},
          {"backends", backends_part(backends)},
          {"defaults", defaults_part(backends)},
          {"launches", launches_part()}};
}

}  // namespace ditattn::cli
