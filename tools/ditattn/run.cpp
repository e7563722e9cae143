// `ditattn run`: attention over the tensors of one file, into another.

#include <fmt/format.h>

#include <array>
#include <chrono>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/guard.hpp"
#include "ditattn/safetensors.hpp"
#include "ditattn/selector.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/inputs.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/selection_flags.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

struct Options {
  std::string backend;
  std::string input;
  std::string output;
  std::string device = "cpu";
  SelectionFlags selection;
  std::optional<double> scale;
  CallOptions call;
  bool causal = false;
  bool lse = false;
  bool guard = false;
  std::optional<double> max_error;
  bool json = false;
};

// The backend named by the flag, none without one.
std::optional<Selection> named_backend(const Options& options) {
  if (options.backend.empty()) return std::nullopt;
  const DiffusionAttentionBackendEnum member = parse_member(options.backend);
  Selection selection{.member = member, .backend = member.get_class(), .source = "--backend", .is_explicit = true};
  selection.backend->validate_available();
  return selection;
}

void save(const Options& options, const ForwardOutputs& outputs) {
  SafetensorsFile file;
  file.tensors.emplace("out", copy_to(outputs.out, kCpu));
  if (options.lse) file.tensors.emplace("lse", copy_to(outputs.lse, kCpu));
  save_safetensors(options.output, file);
}

void report(const Options& options, const Selection& selection, const Tensor& out, double milliseconds,
            const GuardReport& guarded) {
  const std::string engine = selection.backend->capabilities().engine;
  if (options.json) {
    Json document = {{"backend", selection.member.name()},
                     {"engine", engine},
                     {"source", selection.source},
                     {"input", options.input},
                     {"output", options.output},
                     {"shape", std::vector<std::int64_t>(out.shape().begin(), out.shape().end())},
                     {"dtype", dtype_name(out.dtype())},
                     {"device", options.device},
                     {"lse", options.lse},
                     {"ms", milliseconds}};
    if (options.guard) document["guard"] = Json::parse(guarded.json());
    print_json(document);
  } else {
    print(printable(fmt::format("{}: out {} {} by {} ({}; {}) in {:.3f} ms\n", options.output, shape_name(out),
                                dtype_name(out.dtype()), selection.member.name(), engine, selection.source,
                                milliseconds)));
    if (options.guard) print(printable(guarded.text()));
  }
}

// The same call once more, with its numbers checked: the time that is told has no check in it.
GuardReport checked(const Options& options, const AttentionImpl& attention, const Inputs& inputs,
                    const ForwardOutputs& outputs) {
  const Guard guard({.every = 1, .rows = 64, .max_error = options.max_error});
  attention.forward(inputs.query, inputs.key, inputs.value, inputs.metadata, outputs);
  return guard.report();
}

int run(const Options& options) {
  // What the command line alone can have wrong comes first, then the device, then the files.
  check_thread_count();
  const AttentionConfig attention_config = parse_selection(options.selection);
  const std::optional<Selection> named = named_backend(options);
  const DLDevice device = parse_device(options.device);

  Inputs inputs = load_inputs(options.input, options.call);
  if (device.device_type != kDLCPU) inputs = inputs_on(inputs, device);
  ImplConfig config = config_for(inputs);
  if (options.scale) config.softmax_scale = options.scale;
  config.causal |= options.causal;
  config.prefix = config.role = options.selection.role;
  Problem problem = check_inputs(inputs, config);
  problem.lse = options.lse;
  ForwardOutputs outputs{.out = allocate_out(problem)};
  if (options.lse) {
    outputs.lse = empty(std::array{problem.batch, problem.num_heads, problem.seq_q}, kFloat32, device);
  }
  const Selection selection =
      named ? *named
            : select_backend(problem, options.selection.role, attention_config, options.selection.role_category);
  config.backend_kwargs = selection.backend_kwargs();

  const auto attention = selection.backend->make(config);
  const auto start = std::chrono::steady_clock::now();
  attention->forward(inputs.query, inputs.key, inputs.value, inputs.metadata, outputs);
  synchronize(device);
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
  save(options, outputs);
  const GuardReport guarded = options.guard ? checked(options, *attention, inputs, outputs) : GuardReport();
  report(options, selection, outputs.out, elapsed.count(), guarded);
  return guarded.failures() > 0 ? kErrorExceeded : kDone;
}

}  // namespace

void add_run_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand("run", "Run attention over the tensors of a safetensors file");
  auto options = std::make_shared<Options>();
  CLI::Option* backend = verb->add_option("--backend", options->backend,
                                          "The backend, in any case (default: configuration, then "
                                          "DIFFUSION_ATTENTION_BACKEND, then the platform's choice)");
  add_selection_flags(*verb, *backend, options->selection);
  verb->add_option("--input", options->input,
                   "safetensors file with query (B, Sq, H, D), key and value (B, Skv, Hkv, D); optionally attn_mask, "
                   "text tokens (joint_query, joint_key, joint_value, joint_attn_mask), packed sequences "
                   "(cu_seqlens_q, cu_seqlens_k: int32)")
      ->required();
  verb->add_option("--output", options->output, "safetensors file to write `out` to, in query's dtype")->required();
  verb->add_flag("--causal", options->causal, "Queries do not see later keys");
  verb->add_option("--scale", options->scale, "Factor of the logits (default: the file's, or else 1/sqrt(D))")
      ->check(number_from());
  verb->add_option("--device", options->device, "cpu or cuda")->capture_default_str();
  add_call_flags(*verb, options->call);
  verb->add_flag("--lse", options->lse, "Write the log-sum-exp too: `lse`, float32 (B, H, Sq + joint)");
  CLI::Option* guard = verb->add_flag("--guard", options->guard,
                                      "Compare 64 rows with float64 attention, and look for NaN: status 5 for wrong "
                                      "numbers");
  verb->add_option("--max-error", options->max_error,
                   "What --guard allows the worst row, relative to its length (default: what rounding allows)")
      ->check(number_from(0))
      ->needs(guard);
  add_json_flag(*verb, options->json);
  verb->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace ditattn::cli
