// Choice by measurement: tuner.hpp for Python.

#include <tvm/ffi/reflection/registry.h>

#include "ditattn/tuner.hpp"
#include "objects.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::String;

Array<Any> results_list(const std::vector<TunedResult>& results) {
  Array<Any> list;
  for (const TunedResult& result : results) list.push_back(tuned_result_dict(result));
  return list;
}

Dict tuned_dict(const TunedProblem& tuned) {
  return {{"problem", problem_dict(tuned.problem)}, {"results", results_list(tuned.results)}};
}

TuneOptions options_from(const Array<String>& members, double budget_ms, std::int64_t seed, bool publish) {
  TuneOptions options{.budget_ms = budget_ms, .seed = static_cast<std::uint64_t>(seed), .publish = publish};
  for (const String& name : members) {
    options.members.push_back(DiffusionAttentionBackendEnum::from_name(std::string(name)));
  }
  return options;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  refl::GlobalDef()
      .def("ditattn.tune",
           [](const Dict& problem, const Array<String>& members, double budget_ms, std::int64_t seed, bool publish) {
             return tuned_dict(tune(problem_from(problem), options_from(members, budget_ms, seed, publish)));
           })
      .def("ditattn.tune_call",
           [](const Tensor& query, const Tensor& key, const Tensor& value, const AttentionMetadata& metadata,
              const Dict& config, const Array<String>& members, double budget_ms, std::int64_t seed, bool publish) {
             const ImplConfig layer{.num_heads = get_or<std::int64_t>(config, "num_heads", 1),
                                    .head_size = get_or<std::int64_t>(config, "head_size", 1),
                                    .softmax_scale = given<double>(config, "softmax_scale"),
                                    .causal = get_or(config, "causal", false),
                                    .num_kv_heads = get_or<std::int64_t>(config, "num_kv_heads", 1)};
             return tuned_dict(
                 tune_call(layer, query, key, value, metadata, options_from(members, budget_ms, seed, publish)));
           })
      .def("ditattn.tuned",
           [](const Dict& problem) {
             const auto found = tuned(problem_from(problem));
             return found ? Any(tuned_dict(*found)) : Any();
           })
      .def("ditattn.tuned_member",
           [](const Dict& problem, const Optional<double>& max_error) {
             const auto bound = max_error.has_value() ? std::optional(max_error.value()) : std::nullopt;
             const auto member = tuned_member(problem_from(problem), bound);
             return member ? Any(String(member->name())) : Any();
           })
      .def("ditattn.tuned_problems",
           [](DLDevice device) {
             Array<Any> list;
             for (const TunedProblem& tuned : tuned_problems(device)) list.push_back(tuned_dict(tuned));
             return list;
           })
      .def("ditattn.tune_cache_file", [](DLDevice device) { return String(tune_cache_file(device)); })
      .def("ditattn.exact_error", [](const String& dtype) { return exact_error(parse_dtype(std::string(dtype))); })
      .def("ditattn.reload_tuned", reload_tuned);
}

}  // namespace
}  // namespace ditattn::python
