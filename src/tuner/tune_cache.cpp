// The cache's file: JSON, one per environment. It says for what and by what it was made, and is believed only where
// all of it holds.

#include "tuner/tune_cache.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <new>

#include "core/atomic_file.hpp"
#include "core/json_fields.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kFormat = "ditattn tuned choices";
constexpr int kVersion = 1;
constexpr std::uintmax_t kMostBytes = std::uintmax_t{64} << 20;  // hundreds of thousands of problems
constexpr int kMostNested = 8;

constexpr std::pair<const char*, std::int64_t Problem::*> kSizes[] = {
    {"batch", &Problem::batch},        {"num_heads", &Problem::num_heads}, {"num_kv_heads", &Problem::num_kv_heads},
    {"seq_q", &Problem::seq_q},        {"seq_kv", &Problem::seq_kv},       {"head_size", &Problem::head_size},
    {"alignment", &Problem::alignment}};
constexpr std::pair<const char*, bool Problem::*> kFlags[] = {{"causal", &Problem::causal},
                                                              {"packed", &Problem::packed},
                                                              {"joint", &Problem::joint},
                                                              {"spans", &Problem::spans},
                                                              {"fp8_kv", &Problem::fp8_kv}};

Json to_json(const TunedProblem& tuned) {
  Json problem{{"dtype", dtype_name(tuned.problem.dtype)}, {"mask", mask_kind_name(tuned.problem.mask)}};
  for (const auto& [name, field] : kSizes) problem[name] = tuned.problem.*field;
  for (const auto& [name, field] : kFlags) problem[name] = tuned.problem.*field;
  Json results = Json::array();
  for (const TunedResult& result : tuned.results) {
    results.push_back({{"backend", result.backend},
                       {"class_path", result.class_path},
                       {"engine", result.engine},
                       {"median_ms", result.median_ms},
                       {"error", std::isfinite(result.error) ? Json(result.error) : Json(nullptr)},
                       {"reason", result.reason}});
  }
  return {{"problem", problem}, {"results", results}};
}

// nlohmann's own conversion takes 1e30, 2.5 and true.
std::int64_t parse_integer(const Json& json, const char* name) {
  const bool is_integer = json.is_number_integer() && json.get<double>() >= 0 && json.get<double>() <= INT32_MAX;
  if (!is_integer) throw ValueError(fmt::format("{}={}", name, shown(json)));
  return json.get<std::int64_t>();
}

double parse_number(const Json& json, const char* name) {
  if (!json.is_number() || !(json.get<double>() >= 0)) throw ValueError(fmt::format("{}={}", name, shown(json)));
  return json.get<double>();
}

const Json& array_of(const Json& json, const char* name) {
  const Json& array = json.at(name);
  if (!array.is_array()) throw ValueError(fmt::format("{}={}", name, shown(array)));
  return array;
}

TunedProblem parse_problem(const Json& json) {
  TunedProblem tuned;
  const Json& problem = json.at("problem");
  tuned.problem.dtype = parse_dtype(problem.at("dtype").get<std::string>());
  tuned.problem.mask = parse_mask_kind(problem.at("mask").get<std::string>());
  for (const auto& [name, field] : kSizes) tuned.problem.*field = parse_integer(problem.at(name), name);
  if (tuned.problem.num_kv_heads == 0) throw ValueError("num_kv_heads=0");
  for (const auto& [name, field] : kFlags) tuned.problem.*field = problem.at(name).get<bool>();
  for (const Json& result : array_of(json, "results")) {
    const Json& error = result.at("error");
    tuned.results.push_back(
        {.backend = result.at("backend").get<std::string>(),
         .class_path = result.at("class_path").get<std::string>(),
         .engine = result.at("engine").get<std::string>(),
         .median_ms = parse_number(result.at("median_ms"), "median_ms"),
         .error = error.is_null() ? std::numeric_limits<double>::quiet_NaN() : parse_number(error, "error"),
         .reason = result.at("reason").get<std::string>()});
  }
  return tuned;
}

// In what the file's environment differs from this one; empty if in nothing.
std::string differences(const Json& theirs, const TunedFor& ours) {
  std::string text;
  for (const auto& [key, value] : ours) {
    const std::string other = theirs.contains(key) ? theirs.at(key).get<std::string>() : std::string();
    if (other != value) text += fmt::format("{}{} '{}', here '{}'", text.empty() ? "" : ", ", key, other, value);
  }
  if (text.empty() && theirs.size() != ours.size()) text = "things that this version does not know";
  return text;
}

// Throws whatever is wrong with it.
std::vector<TunedProblem> parse_cache(const fs::path& file, const TunedFor& environment) {
  if (const auto bytes = fs::file_size(file); bytes > kMostBytes) {
    throw ValueError(fmt::format("it has {} bytes, {} at most", bytes, kMostBytes));
  }
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw FileError(fmt::format("it cannot be opened: {}", std::strerror(errno)));
  // What is nested deeply would use up the stack where it is printed or destroyed.
  Json json = Json::parse(stream, [](int depth, Json::parse_event_t, const Json&) {
    if (depth > kMostNested) throw ValueError(fmt::format("it is nested deeper than {} levels", kMostNested));
    return true;
  });
  if (json.at("format") != kFormat || json.at("version") != kVersion) {
    throw ValueError(fmt::format("it is of the format {}, version {}, not \"{}\", version {}", shown(json["format"]),
                                 shown(json["version"]), kFormat, kVersion));
  }
  if (const std::string other = differences(json.at("environment"), environment); !other.empty()) {
    throw ValueError(fmt::format("it was made for {}", other));
  }
  std::vector<TunedProblem> problems;
  for (const Json& problem : array_of(json, "problems")) problems.push_back(parse_problem(problem));
  return problems;
}

void set_aside(const fs::path& file, const std::string& reason, bool is_frozen) {
  std::string where = ".";
  if (!is_frozen) {
    const fs::path aside = file.string() + ".set-aside";
    std::error_code error;
    fs::rename(file, aside, error);
    if (!error) where = fmt::format("; it is now '{}'.", aside.string());
  }
  log(LogLevel::warning,
      fmt::format("Tuned choices in '{}' are not used: {}{} Run `ditattn tune` again.", file.string(), reason, where));
}

// Held by whoever reads, adds and writes. Where no lock can be had (some network file systems), the later writer wins.
class PublishLock {
 public:
  explicit PublishLock(const fs::path& file)
      : descriptor_(::open((file.string() + ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
    if (descriptor_ >= 0) ::flock(descriptor_, LOCK_EX);
  }
  ~PublishLock() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  PublishLock(const PublishLock&) = delete;
  PublishLock& operator=(const PublishLock&) = delete;

 private:
  int descriptor_;
};

// FileError where it is there and cannot be opened, which says nothing of what is in it.
std::vector<TunedProblem> read_or_set_aside(const fs::path& file, const TunedFor& environment, bool is_frozen) {
  std::error_code missing;
  if (file.empty() || !fs::exists(file, missing)) return {};
  try {
    return parse_cache(file, environment);
  } catch (const FileError&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const Error& error) {
    set_aside(file, error.message(), is_frozen);
  } catch (const std::exception& error) {
    set_aside(file, error.what(), is_frozen);
  }
  return {};
}

}  // namespace

bool same_measurement(const Problem& a, const Problem& b) {
  return a.dtype == b.dtype && a.mask == b.mask &&
         std::ranges::all_of(kSizes, [&](const auto& size) { return a.*size.second == b.*size.second; }) &&
         std::ranges::all_of(kFlags, [&](const auto& flag) { return a.*flag.second == b.*flag.second; });
}

void sort_results(std::vector<TunedResult>& results) {
  std::ranges::stable_sort(results, {}, [](const TunedResult& result) {
    return result.reason.empty() ? result.median_ms : std::numeric_limits<double>::infinity();
  });
}

void put_tuned(std::vector<TunedProblem>& all, TunedProblem measured, Others others) {
  const auto is_same = [&](const TunedProblem& old) { return same_measurement(old.problem, measured.problem); };
  if (const auto old = std::ranges::find_if(all, is_same); old != all.end()) {
    if (others == Others::kept) {
      std::erase_if(old->results, [&](const TunedResult& result) {
        return std::ranges::find(measured.results, result.backend, &TunedResult::backend) != measured.results.end();
      });
      std::ranges::move(old->results, std::back_inserter(measured.results));
      sort_results(measured.results);
    }
    all.erase(old);
  }
  all.push_back(std::move(measured));
}

std::vector<TunedProblem> read_tune_cache(const fs::path& file, const TunedFor& environment, bool is_frozen) {
  try {
    return read_or_set_aside(file, environment, is_frozen);
  } catch (const FileError& error) {
    log(LogLevel::warning, fmt::format("Tuned choices in '{}' are not used: {}.", file.string(), error.message()));
  }
  return {};
}

void publish_tuned(const fs::path& file, const TunedFor& environment, const std::vector<TunedProblem>& problems) {
  publish_tuned(file, environment, problems, Others::dropped);
}

void publish_tuned(const fs::path& file, const TunedFor& environment, const std::vector<TunedProblem>& problems,
                   Others others) {
  std::error_code error;
  fs::create_directories(file.parent_path(), error);
  if (error) {
    throw FileError(fmt::format("Cannot make the folder '{}' for tuned choices: {}. DITATTN_TUNE_CACHE names another.",
                                file.parent_path().string(), error.message()));
  }
  const PublishLock lock(file);
  std::vector<TunedProblem> all;
  try {
    all = read_or_set_aside(file, environment, false);
  } catch (const FileError& unread) {  // what is in it must not be lost
    throw FileError(fmt::format("Cannot add to the tuned choices '{}': {}.", file.string(), unread.message()));
  }
  for (const TunedProblem& added : problems) put_tuned(all, added, others);
  Json entries = Json::array();
  for (const TunedProblem& tuned : all) entries.push_back(to_json(tuned));
  const Json json{
      {"format", kFormat}, {"version", kVersion}, {"environment", environment}, {"problems", std::move(entries)}};
  // Names of backends and reasons may come from anywhere: what is no UTF-8 in them is replaced.
  const std::string text = json.dump(1, ' ', false, Json::error_handler_t::replace);
  write_atomically(file, "tuned choices", [&](std::ostream& stream) { stream << text << '\n'; });
}

}  // namespace ditattn
