// Names, class paths and plug-ins that break every rule of docs/plugins.md: tables that lack functions, or whose
// functions return something else or throw anything.

#include <ditattn/ditattn.hpp>
#include <ditattn/plugin.hpp>
#include <fuzzer/FuzzedDataProvider.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>

#include <array>
#include <limits>
#include <stdexcept>

#include "tests/fuzz/fuzzing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace {

using ditattn::BackendClass;
using ditattn::DiffusionAttentionBackendEnum;
using ditattn::fuzzing::allow_errors;
using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;

constexpr std::array kTableEntries = {"interface_version", "get_name", "capabilities", "validate_available",
                                      "known_kwargs",      "explain",  "kernel_name",  "create"};
constexpr std::array kCapabilities = {"engine",        "devices", "dtypes", "head_sizes", "head_size_min",
                                      "head_size_max", "masks",   "gqa",    "lse",        "head_size_multiple",
                                      "alignment",     "packed",  "joint",  "causal"};

// What a plug-in may throw, in C++ or through tvm-ffi.
void throw_something(int what) {
  switch (what) {
    case 0:
      throw 42;
    case 1:
      throw std::runtime_error("a plug-in's own");
    case 2:
      throw std::bad_alloc();
    case 3:
      throw tvm::ffi::Error("KindOfItsOwn", "", "");
    case 4:
      throw ditattn::NotImplementedError("not here");
    default:
      return;
  }
}

Any draw_value(FuzzedDataProvider& bytes, int depth);

Function draw_function(FuzzedDataProvider& bytes, int depth) {
  const int thrown = bytes.ConsumeIntegralInRange(0, 9);
  const Any result = depth > 0 ? draw_value(bytes, depth - 1) : Any();
  return Function::FromPacked([thrown, result](const tvm::ffi::AnyView* /*args*/, int /*count*/, Any* returned) {
    throw_something(thrown);
    *returned = result;
  });
}

// Anything that a table may hold.
Any draw_value(FuzzedDataProvider& bytes, int depth) {
  switch (bytes.ConsumeIntegralInRange(0, 9)) {
    case 0:
      return bytes.ConsumeIntegral<std::int64_t>();
    case 1:
      return static_cast<std::int64_t>(bytes.ConsumeIntegralInRange(-2, 300));
    case 2:
      return bytes.ConsumeBool();
    case 3:
      return std::numeric_limits<double>::quiet_NaN();
    case 4:
      return String(bytes.ConsumeRandomLengthString(12));
    case 5:
      return ditattn::empty({2}, ditattn::kFloat32);
    case 6: {
      Array<Any> array;
      while (depth > 0 && bytes.ConsumeBool()) array.push_back(draw_value(bytes, depth - 1));
      return array;
    }
    case 7: {
      Map<String, Any> map;
      while (depth > 0 && bytes.ConsumeBool())
        map.Set(String(bytes.PickValueInArray(kCapabilities)), draw_value(bytes, depth - 1));
      return map;
    }
    case 8:
      return draw_function(bytes, depth);
    default:
      return {};
  }
}

// A toy whose methods throw what the bytes say.
struct Deeds {
  int name = 9, available = 9, explain = 9, create = 9, run = 9;
} deeds;

class HostileImpl final : public ditattn::AttentionImpl {
 public:
  using AttentionImpl::AttentionImpl;
  void run(const ditattn::AttentionCall& /*call*/) const override { throw_something(deeds.run); }
};

class HostileBackend final : public ditattn::testing::ToyBackend {
 public:
  [[nodiscard]] std::string get_name() const override {
    throw_something(deeds.name);
    return "HOSTILE";
  }
  void validate_available() const override { throw_something(deeds.available); }
  [[nodiscard]] ditattn::Verdict explain(const ditattn::Problem& problem) const override {
    throw_something(deeds.explain);
    return ToyBackend::explain(problem);
  }

 protected:
  [[nodiscard]] std::unique_ptr<ditattn::AttentionImpl> create(const ditattn::ImplConfig& config) const override {
    throw_something(deeds.create);
    return std::make_unique<HostileImpl>(config);
  }
};

BackendClass find(std::string_view class_name) {
  if (class_name == "Hostile") return std::make_shared<HostileBackend>();
  if (class_name == "Throws") throw 42;
  return class_name == "Toy" ? std::make_shared<ditattn::testing::ToyBackend>() : nullptr;
}

void use(const BackendClass& backend) {
  allow_errors([&] { backend->validate_available(); });
  allow_errors([&] { static_cast<void>(backend->get_supported_head_sizes()); });
  allow_errors([&] { static_cast<void>(backend->explain({}).text()); });
  allow_errors([&] { static_cast<void>(backend->kernel_name({})); });
  allow_errors([&] { ditattn::testing::toy_answer(*backend); });
}

void try_table(FuzzedDataProvider& bytes) {
  auto table = ditattn::backend_table(find, "Toy", DITATTN_INTERFACE_VERSION).cast<Map<String, Any>>();
  while (bytes.remaining_bytes() > 0 && bytes.ConsumeBool()) {
    const String entry(bytes.PickValueInArray(kTableEntries));
    if (bytes.ConsumeBool()) {
      table.erase(entry);
    } else {
      table.Set(entry, draw_value(bytes, 3));
    }
  }
  allow_errors([&] { use(ditattn::backend_from_table(bytes.ConsumeBool() ? Any(table) : draw_value(bytes, 2), "m")); });
}

// The exported symbol, called as C calls it.
void try_export(FuzzedDataProvider& bytes) {
  const Any argument = draw_value(bytes, 2);
  const tvm::ffi::AnyView view = argument;
  Any result;
  const int status =
      ditattn::export_backend_table(find, bytes.ConsumeIntegralInRange(0, 9), reinterpret_cast<const TVMFFIAny*>(&view),
                                    bytes.ConsumeIntegralInRange(0, 1), reinterpret_cast<TVMFFIAny*>(&result));
  if (status != 0) {
    try {
      throw tvm::ffi::detail::MoveFromSafeCallRaised();
    } catch (const tvm::ffi::Error&) {
    }
  }
}

void try_names(FuzzedDataProvider& bytes) {
  const std::string text = bytes.ConsumeRandomLengthString(64);
  const auto member =
      bytes.ConsumeBool() ? DiffusionAttentionBackendEnum::CUSTOM : DiffusionAttentionBackendEnum::TORCH_SDPA;
  allow_errors([&] { DiffusionAttentionBackendEnum::from_name(text); });
  allow_errors([&] { DiffusionAttentionBackendEnum::define("FUZZED", text); });  // one: members stay
  allow_errors([&] { use(ditattn::resolve_class_path(text)); });
  allow_errors([&] {
    ditattn::register_diffusion_backend(member, text);
    ditattn::fuzzing::require(text.empty() || member.get_path() == text, "an override is the path");
    static_cast<void>(member.get_path(false));
    use(member.get_class());
  });
  allow_errors([&] {
    ditattn::register_backend_class("r." + text.substr(0, 1), std::make_shared<ditattn::testing::ToyBackend>());
  });
  member.clear_override();
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*count*/, char*** /*arguments*/) {
  ditattn::link_backend_module("fuzz", find);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider bytes(data, size);
  for (int* deed : {&deeds.name, &deeds.available, &deeds.explain, &deeds.create, &deeds.run}) {
    *deed = bytes.ConsumeIntegralInRange(0, 9);
  }
  switch (bytes.ConsumeIntegralInRange(0, 2)) {
    case 0:
      try_names(bytes);
      break;
    case 1:
      try_export(bytes);
      break;
    default:
      try_table(bytes);
  }
  ditattn::link_backend_module("fuzz", find);  // forgets what was resolved
  allow_errors([] { use(ditattn::resolve_class_path("fuzz.Hostile")); });
  return 0;
}
