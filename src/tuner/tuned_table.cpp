#include "tuner/tuned_table.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <mutex>
#include <set>
#include <shared_mutex>

#include "core/fork_locks.hpp"
#include "core/interrupt.hpp"
#include "core/log_once.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/threads.hpp"
#include "registry/enum.hpp"
#include "tuner/tuned_for.hpp"

namespace ditattn {
namespace {

// Whether measured results still say something of what members stand for now; asked once per member and measurement.
class StillHolds {
 public:
  std::optional<Member> operator()(const TunedResult& result) {
    const auto [known, is_new] = known_.try_emplace({result.backend, result.class_path, result.engine});
    if (is_new) {
      std::string reason;
      known->second = ask(result, reason);
      if (!known->second) {
        log_once(LogLevel::info,
                 fmt::format("What was measured of {} does not count any more: {}. Run `ditattn tune` again.",
                             result.backend, reason));
      }
    }
    return known->second;
  }

 private:
  static std::optional<Member> ask(const TunedResult& result, std::string& reason) {
    try {
      const Member member = Member::from_name(result.backend);
      if (const std::string path = member.get_path(); path != result.class_path) {
        reason = fmt::format("it was '{}', now it is '{}'", result.class_path, path);
        return std::nullopt;
      }
      const BackendClass backend = member.get_class();
      backend->validate_available();
      if (const std::string& engine = backend->capabilities().engine; engine != result.engine) {
        reason = fmt::format("its engine was '{}', now it is '{}'", result.engine, engine);
        return std::nullopt;
      }
      return member;
    } catch (const tvm::ffi::Error& error) {  // of any language
      if (is_interrupt(error)) throw;
      reason = std::string(error.message());
      return std::nullopt;
    }
  }

  std::map<std::tuple<std::string, std::string, std::string>, std::optional<Member>> known_;
};

// Rounded down to a quarter of a power of two.
std::int64_t quarter(std::int64_t n) {
  if (n < 8) return n;
  const int shift = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n))) - 3;
  return n >> shift << shift;
}

std::int64_t dtype_number(DLDataType dtype) { return dtype.code << 16 | dtype.bits << 8 | dtype.lanes; }

// Everything that is not a size. Above 16 bytes no backend asks for more.
std::int64_t kind_number(const Problem& p) {
  return static_cast<std::int64_t>(p.mask) | p.causal << 4 | p.packed << 5 | p.joint << 6 | p.spans << 7 |
         p.fp8_kv << 8 | std::int64_t{p.alignment >= 16} << 9;
}

constexpr std::uint64_t kNever = ~std::uint64_t{0};

struct DeviceState {
  std::filesystem::path file;
  TunedFor environment;
  std::vector<TunedProblem> problems;
  std::shared_ptr<const TunedTable> table;
  std::uint64_t changes = kNever;  // registrations when the table was made
};

struct Tables {
  std::shared_mutex mutex;
  std::optional<TuneMode> mode;  // as it was when the first table was read
  std::map<std::array<int, 3>, DeviceState> devices;
};

// Never destroyed: a thread may call while the process ends.
Tables& tables() {
  static Tables& instance = *new Tables;
  [[maybe_unused]] static const bool held = hold_over_fork(instance.mutex);
  return instance;
}

// Times on the CPU are those of as many threads as there were.
std::array<int, 3> key_of(DLDevice device) {
  return {device.device_type, device.device_id, device.device_type == kDLCUDA ? 0 : num_threads()};
}

DeviceState read_state(DLDevice device, TuneMode mode) {
  DeviceState state{.file = {}, .environment = tuned_for(device), .problems = {}, .table = {}};
  const std::filesystem::path folder = tune_cache_folder();
  if (!folder.empty()) state.file = folder / file_name(state.environment);
  if (mode != TuneMode::off) {
    state.problems = read_tune_cache(state.file, state.environment, mode == TuneMode::frozen);
    for (TunedProblem& tuned : state.problems) tuned.problem.device = device;
  }
  return state;
}

// Calls `body` with the device's state, read where it was not: without the lock, since that logs.
template <class Body>
auto with_state(DLDevice device, const Body& body) {
  const auto find = [&] { return tables().devices.find(key_of(device)); };
  std::unique_lock lock(tables().mutex);
  auto found = find();
  if (found == tables().devices.end()) {
    lock.unlock();
    DeviceState read = read_state(device, current_tune_mode());
    lock.lock();
    found = tables().devices.try_emplace(key_of(device), std::move(read)).first;
  }
  return body(found->second);
}

}  // namespace

const TunedEntry::Result* TunedEntry::of(Member member) const {
  const auto found = std::ranges::find(usable, member, &Result::member);
  return found == usable.end() ? nullptr : &*found;
}

TunedTable::TunedTable(const std::vector<TunedProblem>& problems) {
  StillHolds still_holds;
  for (const TunedProblem& tuned : problems) {
    TunedEntry entry{.tuned = {.problem = tuned.problem, .results = {}}, .usable = {}};
    for (const TunedResult& result : tuned.results) {
      const std::optional<Member> member = still_holds(result);
      if (!member) continue;
      entry.tuned.results.push_back(result);
      if (!result.reason.empty()) continue;
      note_error(*member, tuned.problem.dtype, result.error);
      if (result.median_ms > 0 && result.error >= 0) entry.usable.push_back({*member, result.median_ms, result.error});
    }
    std::ranges::stable_sort(entry.usable, {}, &TunedEntry::Result::median_ms);
    if (!entry.usable.empty()) index_[near_key(tuned.problem)] = entries_.size();
    index_[exact_key(tuned.problem)] = entries_.size();
    entries_.push_back(std::move(entry));
  }
}

std::size_t TunedTable::KeyHash::operator()(const Key& key) const {
  std::uint64_t hash = 0;
  for (const std::int64_t value : key) {
    hash = (hash ^ static_cast<std::uint64_t>(value)) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 32;
  }
  return hash;
}

TunedTable::Key TunedTable::exact_key(const Problem& p) {
  return {p.batch,     p.num_heads, p.num_kv_heads,        p.seq_q,       p.seq_kv,
          p.head_size, 0,           dtype_number(p.dtype), kind_number(p)};
}

TunedTable::Key TunedTable::near_key(const Problem& p) {
  return {quarter(p.batch * p.num_heads),
          p.num_heads / std::max<std::int64_t>(p.num_kv_heads, 1),
          0,
          quarter(p.seq_q),
          quarter(p.seq_kv),
          p.head_size,
          1,
          dtype_number(p.dtype),
          kind_number(p)};
}

const TunedEntry* TunedTable::find(const Problem& problem) const {
  if (const auto found = index_.find(exact_key(problem)); found != index_.end()) return &entries_[found->second];
  if (const auto found = index_.find(near_key(problem)); found != index_.end()) return &entries_[found->second];
  return nullptr;
}

void TunedTable::note_error(Member member, DLDataType dtype, double error) {
  for (Worst& worst : worst_) {
    if (worst.member != member || worst.dtype != dtype) continue;
    if (std::isnan(error) || error > worst.error) worst.error = error;
    return;
  }
  worst_.push_back({member, dtype, error});
}

std::optional<double> TunedTable::worst_error(Member member, DLDataType dtype) const {
  for (const Worst& worst : worst_) {
    if (worst.member == member && worst.dtype == dtype) return worst.error;
  }
  return std::nullopt;
}

std::shared_ptr<const TunedTable> tuned_table(DLDevice device) {
  const std::uint64_t changes = registration_changes();
  {
    const std::shared_lock lock(tables().mutex);
    const auto found = tables().devices.find(key_of(device));
    if (found != tables().devices.end() && found->second.changes == changes) return found->second.table;
  }
  const auto problems = with_state(device, [](const DeviceState& state) { return state.problems; });
  // Asks classes, which may load plug-ins, which may come back here: no lock is held.
  const bool is_wanted = !problems.empty() && current_tune_mode() != TuneMode::off;
  auto table = is_wanted ? std::make_shared<const TunedTable>(problems) : nullptr;
  with_state(device, [&](DeviceState& state) {
    state.table = table;
    state.changes = changes;
  });
  return table;
}

TuneMode current_tune_mode() {
  {
    const std::shared_lock lock(tables().mutex);
    if (const auto mode = tables().mode) return *mode;
  }
  const TuneMode mode = tune_mode();
  const std::unique_lock lock(tables().mutex);
  tables().mode = mode;
  return mode;
}

void add_tuned(DLDevice device, const TunedProblem& problem, Others others, bool publish) {
  std::filesystem::path file;
  TunedFor environment;
  with_state(device, [&](DeviceState& state) {
    put_tuned(state.problems, problem, others);
    state.changes = kNever;  // the table is made anew
    file = state.file;
    environment = state.environment;
  });
  forget_resolved_members();  // who was passed over without measurements may be the best now
  if (publish && !file.empty()) publish_tuned(file, environment, {problem}, others);
}

std::vector<TunedProblem> tuned_problems(DLDevice device) {
  return with_state(device, [](const DeviceState& state) { return state.problems; });
}

std::string tune_cache_file(DLDevice device) {
  return with_state(device, [](const DeviceState& state) { return state.file.string(); });
}

void reload_tuned() {
  {
    const std::unique_lock lock(tables().mutex);
    tables().devices.clear();
    tables().mode.reset();
  }
  forget_resolved_members();
}

}  // namespace ditattn
