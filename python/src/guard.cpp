// What python/ditattn/guard.py needs: a guard as two functions, and what it found as dicts.

#include "ditattn/guard.hpp"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/reflection/registry.h>

#include "ditattn/errors.hpp"
#include "objects.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::String;

std::int64_t number(std::uint64_t value) { return static_cast<std::int64_t>(value); }

Dict finding_dict(const GuardFinding& finding) {
  return {{"layer", String(finding.layer)},
          {"role", String(finding.role)},
          {"backend", String(finding.backend)},
          {"problem", String(finding.problem)},
          {"call", number(finding.call)},
          {"error", finding.error},
          {"bound", finding.bound},
          {"row", Array<std::int64_t>{finding.batch, finding.head, finding.query}},
          {"non_finite", finding.non_finite},
          {"without_keys", finding.without_keys},
          {"action", String(finding.action)},
          {"text", String(finding.text())}};
}

Dict layer_dict(const GuardedLayer& layer) {
  return {{"layer", String(layer.layer)},
          {"role", String(layer.role)},
          {"backend", String(layer.backend)},
          {"calls", number(layer.calls)},
          {"checks", number(layer.checks)},
          {"failures", number(layer.failures)},
          {"captured", number(layer.captured)},
          {"not_checked", number(layer.not_checked)},
          {"reason", String(layer.reason)},
          {"last_error", layer.last_error},
          {"worst", layer.checks > 0 ? Any(finding_dict(layer.worst)) : Any()},
          {"non_finite", number(layer.non_finite)},
          {"replaced_by", String(layer.replaced_by)},
          {"replaced_at", number(layer.replaced_at)}};
}

Dict report_dict(const GuardReport& report) {
  Array<Any> layers;
  for (const GuardedLayer& layer : report.layers) layers.push_back(layer_dict(layer));
  return {{"layers", layers}, {"text", String(report.text())}, {"json", String(report.json())}};
}

template <class Choice>
Choice chosen(const Dict& options, const char* what, const std::vector<std::pair<std::string, Choice>>& choices) {
  const std::string name = options.at(String(what)).cast<String>();
  std::string valid;
  for (const auto& [known, choice] : choices) {
    if (known == name) return choice;
    valid += (valid.empty() ? "" : ", ") + known;
  }
  throw ValueError(std::string(what) + "='" + name + "' is not known. Valid values are: " + valid);
}

GuardOptions options_from(const Dict& options, const Optional<Function>& on_event) {
  const auto texts = [&](const char* key) {
    const auto list = options.at(String(key)).cast<Array<String>>();
    return std::vector<std::string>(list.begin(), list.end());
  };
  GuardOptions result{
      .every = options.at(String("every")).cast<std::int64_t>(),
      .rows = options.at(String("rows")).cast<std::int64_t>(),
      .on_failure = chosen<GuardAction>(
          options, "on_failure",
          {{"report", GuardAction::report}, {"raise", GuardAction::raise}, {"replace", GuardAction::replace}}),
      .scope = chosen<GuardScope>(options, "scope", {{"layer", GuardScope::layer}, {"role", GuardScope::role}}),
      .safer = options.at(String("safer")).cast<String>(),
      .layers = texts("layers"),
      .roles = texts("roles"),
      .scan = options.at(String("scan")).cast<bool>(),
      .seed = static_cast<std::uint64_t>(options.at(String("seed")).cast<std::int64_t>())};
  if (const Any& max_error = options.at(String("max_error")); max_error != nullptr) {
    result.max_error = max_error.cast<double>();
  }
  if (on_event.has_value()) {
    result.on_event = [call = on_event.value()](const GuardFinding& finding) { call(finding_dict(finding)); };
  }
  return result;
}

// {"end": ends it, "report": what it found, also after}
Dict guard(const Dict& options, const Optional<Function>& on_event) {
  const auto made = std::make_shared<Guard>(options_from(options, on_event));
  return {{"end", Function::FromTyped([made] { made->end(); })},
          {"report", Function::FromTyped([made] { return report_dict(made->report()); })}};
}

TVM_FFI_STATIC_INIT_BLOCK() { refl::GlobalDef().def("ditattn.guard", guard); }

}  // namespace
}  // namespace ditattn::python
