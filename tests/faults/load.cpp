// Many threads compute with all back ends while one changes what names stand for and the tuned choices. Each result
// must be, byte for byte, what a class that its name stood for gives alone; memory must not grow.

#include <CLI/CLI.hpp>
#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>

#include "tests/faults/load_problems.hpp"
#include "tests/unit/toy_backend.hpp"
#include "tuner/tune_cache.hpp"

namespace {

using namespace ditattn;
using namespace ditattn::faults;
using Enum = DiffusionAttentionBackendEnum;
using Clock = std::chrono::steady_clock;

const std::string kPrefix = "vllm_omni.diffusion.attention.backends.";
const std::string kFlash = kPrefix + "flash_attn.FlashAttentionBackend";
const std::string kSdpa = kPrefix + "sdpa.SDPABackend";
const std::string kSage = kPrefix + "sage_attn.SageAttentionBackend";
const std::string kSage3 = kPrefix + "sage_attn3.SageAttention3Backend";
const std::string kFirst = "faults.load.First";
const std::string kSecond = "faults.load.Second";
const std::string kNowhere = "faults.nowhere.Backend";

// A name that is asked for, and the class paths it may stand for meanwhile.
struct Asked {
  std::string name;
  std::vector<std::string> paths;
};

const std::vector<Asked>& asked() {
  static const std::vector<Asked> all{
      {"FLASH_ATTN", {kFlash}},  {"TORCH_SDPA", {kSdpa}},   {"SAGE_ATTN", {kSage, kFlash}},
      {"SAGE_ATTN_3", {kSage3}}, {"auto", {kFlash, kSdpa}}, {"CUSTOM", {kFirst, kSecond, kSdpa, kNowhere}},
  };
  return all;
}

// Takes what FLASH_ATTN does but joint tokens, whose rows it does not write: the mean over the keys does not ask what
// hides them.
Capabilities mean_capabilities() {
  Capabilities can = Enum::FLASH_ATTN.get_class()->capabilities();
  can.engine = "mean of V";
  can.joint = false;
  return can;
}

class Load {
 public:
  explicit Load(int problems) : problems_(load_problems(problems, {kFlash, kSdpa, kSage, kSage3, kFirst, kSecond})) {}

  void compute(unsigned seed) {
    std::mt19937 random(seed);
    while (!stop_) {
      const LoadProblem& problem = problems_[random() % problems_.size()];
      const Asked& who = asked()[random() % asked().size()];
      try {
        check(problem, who, call(problem.drawn, who.name, random() % 2 == 0, random() % 2 == 0));
      } catch (const Error& error) {
        check_refusal(problem, who, error);
      } catch (const std::exception& error) {
        fail(fmt::format("{}: not an error of the library: {}", who.name, error.what()));
      }
    }
  }

  // Registers, overrides, clears, defines, publishes and reloads, again and again.
  void change() {
    std::mt19937 random(1);
    while (!stop_) {
      switch (random() % 8) {
        case 0:
          register_diffusion_backend(Enum::CUSTOM, kFirst);
          break;
        case 1:
          register_diffusion_backend(Enum::CUSTOM, random() % 2 == 0 ? kSecond : kSdpa);
          break;
        case 2:
          register_diffusion_backend(Enum::CUSTOM, kNowhere);
          break;
        case 3:
          Enum::CUSTOM.clear_override();
          break;
        case 4:
          register_diffusion_backend(Enum::SAGE_ATTN, kFlash);
          break;
        case 5:
          Enum::SAGE_ATTN.clear_override();
          break;
        case 6:
          Enum::define(fmt::format("LOAD_{}", random() % 4), kFlash);
          register_backend_class(kSecond, std::make_shared<testing::ToyBackend>("SECOND", 2, mean_capabilities()));
          break;
        default:
          publish(static_cast<unsigned>(random()));
          reload_tuned();
      }
      ++changes_;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  void stop() { stop_ = true; }
  void fail(const std::string& what) {
    const std::lock_guard lock(mutex_);
    if (failures_++ < 10) fmt::print(stderr, "wrong: {}\n", what);
  }
  [[nodiscard]] std::uint64_t calls() const { return calls_; }
  [[nodiscard]] std::uint64_t refusals() const { return refusals_; }
  [[nodiscard]] std::uint64_t changes() const { return changes_; }
  [[nodiscard]] int failures() const { return failures_; }

 private:
  static Result call(const conformance::Drawn& drawn, const std::string& name, bool with_out, bool own_layer) {
    return result_of(drawn, with_out, [&](const ForwardOutputs& outputs) {
      if (own_layer && name != "auto") {
        const auto impl = Enum::from_name(name).get_class()->make(drawn.config);
        return impl->forward(drawn.query, drawn.key, drawn.value, drawn.metadata, outputs);
      }
      return attention(drawn.query, drawn.key, drawn.value, {.backend = name, .causal = drawn.config.causal},
                       drawn.metadata, outputs);
    });
  }

  void check(const LoadProblem& problem, const Asked& who, const Result& got) {
    ++calls_;
    for (const std::string& path : who.paths) {
      const auto found = problem.alone.find(path);
      if (found != problem.alone.end() && found->second == got) return;
    }
    fail(fmt::format("{} gave what none of its classes gives alone: {}", who.name, problem.drawn.text));
  }

  // A refusal must be that of a class that refuses alone, or of a name that stood for nothing.
  void check_refusal(const LoadProblem& problem, const Asked& who, const Error& error) {
    ++refusals_;
    const bool is_missing =
        error.kind() == "ImportError" || error.message().find("must be registered before use") != std::string::npos;
    if (is_missing && who.name == "CUSTOM") return;
    const bool some_refuse = std::ranges::any_of(who.paths, [&](const auto& p) { return !problem.alone.contains(p); });
    if (error.kind() == "ValueError" && !is_missing && some_refuse) return;
    fail(fmt::format("{}: {}: {} ({})", who.name, error.kind(), error.message(), problem.drawn.text));
  }

  // A made-up measurement, by which "auto" is now the one and now the other.
  void publish(unsigned random) {
    const conformance::Drawn& drawn = problems_[random % problems_.size()].drawn;
    const auto impl = Enum::FLASH_ATTN.get_class()->make(drawn.config);
    const bool flash = random / 7 % 2 == 0;
    const auto result = [&](const char* name, const std::string& path, bool fast) {
      return TunedResult{.backend = name,
                         .class_path = path,
                         .engine = Enum::from_name(name).get_class()->capabilities().engine,
                         .median_ms = fast ? 1.0 : 9.0,
                         .error = 1e-8};
    };
    Problem problem{.batch = drawn.query.size(0),
                    .num_heads = drawn.config.num_heads,
                    .num_kv_heads = *drawn.config.num_kv_heads,
                    .seq_q = drawn.query.size(1),
                    .seq_kv = drawn.key.size(1),
                    .head_size = drawn.config.head_size,
                    .dtype = drawn.query.dtype(),
                    .causal = drawn.config.causal};
    publish_tuned(
        tune_cache_file(kCpu), tuned_for(kCpu),
        {{.problem = problem, .results = {result("FLASH_ATTN", kFlash, flash), result("TORCH_SDPA", kSdpa, !flash)}}});
  }

  std::vector<LoadProblem> problems_;
  std::atomic<bool> stop_ = false;
  std::atomic<std::uint64_t> calls_ = 0;
  std::atomic<std::uint64_t> refusals_ = 0;
  std::atomic<std::uint64_t> changes_ = 0;
  std::atomic<int> failures_ = 0;
  std::mutex mutex_;
};

double resident_megabytes() {
  std::ifstream stream("/proc/self/statm");
  std::int64_t pages = 0;
  stream >> pages >> pages;
  return static_cast<double>(pages * ::sysconf(_SC_PAGESIZE)) * 1e-6;
}

// What malloc has given and not got back, of all arenas, whose free memory `resident_megabytes` has too. 0 under
// sanitizers, which have their own.
double live_megabytes() {
  const auto info = ::mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd) * 1e-6;
}

// The largest of the samples in a part of the run. The allocator's arenas breathe: single samples tell little.
double largest(const std::vector<double>& samples, double from, double to) {
  const auto at = [&](double part) {
    return samples.begin() + static_cast<std::int64_t>(part * double(samples.size()));
  };
  return *std::max_element(at(from), std::max(at(from) + 1, at(to)));
}

// A folder of tuned choices that is there while the program runs.
class TuneFolder {
 public:
  TuneFolder() : folder_(std::filesystem::temp_directory_path() / fmt::format("ditattn_load.{}", ::getpid())) {
    ::setenv("DITATTN_TUNE", "use", 1);
    ::setenv("DITATTN_TUNE_CACHE", folder_.c_str(), 1);
  }
  ~TuneFolder() { std::filesystem::remove_all(folder_); }
  TuneFolder(const TuneFolder&) = delete;
  TuneFolder& operator=(const TuneFolder&) = delete;

 private:
  std::filesystem::path folder_;
};

}  // namespace

int main(int argc, char** argv) {
  double seconds = 4;
  int threads = 64;
  int problems = 24;
  double growth = 16;
  CLI::App app("Attention from many threads while registrations and tuned choices change");
  app.add_option("--seconds", seconds, "How long")->capture_default_str();
  app.add_option("--threads", threads, "Threads that compute")->capture_default_str();
  app.add_option("--problems", problems, "Problems, over all metadata")->capture_default_str();
  app.add_option("--growth", growth, "MB by which memory may grow in the second half")->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  const TuneFolder folder;
  register_backend_class(kFirst, std::make_shared<testing::ToyBackend>("FIRST", 1, mean_capabilities()));
  register_backend_class(kSecond, std::make_shared<testing::ToyBackend>("SECOND", 2, mean_capabilities()));
  Load load(problems);
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t) all.emplace_back([&load, t] { load.compute(static_cast<unsigned>(t)); });
  all.emplace_back([&load] { load.change(); });

  std::vector<double> resident;
  std::vector<double> live;
  const auto start = Clock::now();
  do {
    std::this_thread::sleep_for(std::chrono::duration<double>(std::min(1.0, seconds / 16)));
    resident.push_back(resident_megabytes());
    live.push_back(live_megabytes());
  } while (Clock::now() < start + std::chrono::duration<double>(seconds));
  load.stop();
  for (std::thread& thread : all) thread.join();

  fmt::print("{} threads, {} s: {} calls, {} refusals, {} changes\n", threads, seconds, load.calls(), load.refusals(),
             load.changes());
  const auto grown = [](const char* name, const std::vector<double>& samples) {
    const double before = largest(samples, 0.25, 0.5);
    const double after = largest(samples, 0.75, 1);
    fmt::print(
        "{} MB: {:.1f} after a quarter, {:.1f} half way, {:.1f} at the end; at most {:.1f} in the second quarter, "
        "{:.1f} in the last\n",
        name, samples[samples.size() / 4], samples[samples.size() / 2], samples.back(), before, after);
    return after - before;
  };
  if (load.calls() == 0 || load.refusals() == 0 || load.changes() == 0) load.fail("nothing was called or changed");
  for (const double megabytes : {grown("resident", resident), grown("live", live)}) {
    if (megabytes > growth) load.fail(fmt::format("memory grew by {:.1f} MB", megabytes));
  }
  return load.failures() == 0 ? 0 : 1;
}
