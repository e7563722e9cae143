#include "tools/ditattn/model_cases.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "tools/ditattn/exit_status.hpp"
#include "tuner/random_call.hpp"

namespace ditattn::cli {
namespace {

// Of one call: seconds, of which a comparison needs several.
double max_tflop(DLDevice device) { return device.device_type == kDLCPU ? 1 : 1000; }

std::string problem_name(const Model& model, const ModelRole& role) {
  return fmt::format("{}@{}:{}", model.name, role.resolution, role.role);
}

// Each once, in the catalogue's order.
std::vector<std::string> distinct(const Model& model, std::string ModelRole::*field) {
  std::vector<std::string> values;
  for (const ModelRole& role : model.roles) {
    if (std::ranges::find(values, role.*field) == values.end()) values.push_back(role.*field);
  }
  return values;
}

void check_part(const Model& model, const char* what, std::string ModelRole::*field, const std::string& value) {
  const std::vector<std::string> known = distinct(model, field);
  if (std::ranges::find(known, value) == known.end()) {
    throw UsageError(
        fmt::format("{} has no {} '{}'. Valid ones are: {}", model.name, what, value, fmt::join(known, ", ")));
  }
}

// Bool, the last quarter of the keys is padding: (batch, keys), or (1, 1, rows, keys) where padded rows, if rows and
// keys are the same tokens, see nothing either.
Tensor padding_mask(const ModelRole& role, std::int64_t rows, std::int64_t keys) {
  const std::int64_t valid_keys = keys - keys / 4;
  const bool by_row = role.mask == MaskKind::boolean;
  const std::int64_t lines = by_row ? rows : role.batch;
  const std::int64_t valid_rows = by_row && rows == keys ? valid_keys : lines;
  Tensor mask = by_row ? empty({1, 1, rows, keys}, kBool) : empty({role.batch, keys}, kBool);
  for (std::int64_t line = 0; line < lines; ++line) {
    for (std::int64_t key = 0; key < keys; ++key) {
      store_element(mask.data_ptr(), line * keys + key, kBool, line < valid_rows && key < valid_keys ? 1 : 0);
    }
  }
  return mask;
}

AttentionMetadataFields masks_of(const ModelRole& role) {
  AttentionMetadataFields fields;
  if (role.mask == MaskKind::none) return fields;
  if (role.joint_tokens > 0) {
    fields.joint_attn_mask = padding_mask(role, role.seq_q, role.joint_tokens);
  } else {
    fields.attn_mask = padding_mask(role, role.seq_q, role.seq_kv);
  }
  return fields;
}

}  // namespace

const Model& model_named(const std::string& name) {
  try {
    return find_model(name);
  } catch (const ValueError& error) {
    throw UsageError(error.message());
  }
}

std::vector<ModelProblem> parse_model_problems(const std::string& given) {
  const std::string text = full_name(given);
  const std::size_t colon = std::min(text.find(':'), text.size());
  const std::size_t at = std::min(text.find('@'), colon);
  const Model& model = model_named(text.substr(0, at));
  const std::string resolution = at < colon ? text.substr(at + 1, colon - at - 1) : model.resolutions.front().name;
  check_part(model, "resolution", &ModelRole::resolution, resolution);
  if (colon < text.size()) check_part(model, "role", &ModelRole::role, text.substr(colon + 1));
  std::vector<ModelProblem> problems;
  for (const ModelRole& role : model.roles) {
    if (role.resolution != resolution) continue;
    if (colon == text.size() || role.role == text.substr(colon + 1))
      problems.push_back({problem_name(model, role), role});
  }
  return problems;
}

double tflop(const ModelRole& role) {
  return 4e-12 * static_cast<double>(role.batch) * static_cast<double>(role.num_heads) *
         static_cast<double>(role.seq_q) * static_cast<double>(role.seq_kv) * static_cast<double>(role.head_size);
}

bool is_affordable(const ModelProblem& problem, DLDevice device) { return tflop(problem.role) <= max_tflop(device); }

void check_work(const ModelProblem& problem, DLDevice device) {
  if (is_affordable(problem, device)) return;
  const Model& model = model_named(problem.name.substr(0, problem.name.find('@')));
  std::vector<std::string> smaller;
  for (const ModelRole& role : model.roles) {
    if (tflop(role) <= max_tflop(device)) smaller.push_back(problem_name(model, role));
  }
  throw ValueError(fmt::format(
      "{} takes {:.3g} TFLOP a call, more than the {} that --model allows on a {}. Choose a smaller role or "
      "resolution: {}",
      problem.name, tflop(problem.role), max_tflop(device), device.device_type == kDLCPU ? "CPU" : "GPU",
      smaller.empty() ? "this model has none, see `ditattn models`" : fmt::format("{}", fmt::join(smaller, ", "))));
}

Case model_case(const ModelProblem& problem, DLDataType dtype, std::uint64_t seed) {
  const ModelRole& role = problem.role;
  NormalTensors normal(seed, dtype);
  const auto tensor = [&](std::int64_t tokens, std::int64_t heads) {
    return normal.next({role.batch, tokens, heads, role.head_size});
  };
  const std::int64_t text = role.joint_tokens;
  Inputs inputs{.query = tensor(role.seq_q - text, role.num_heads),
                .key = tensor(role.seq_kv - text, role.num_kv_heads),
                .value = tensor(role.seq_kv - text, role.num_kv_heads),
                .metadata = {}};
  AttentionMetadataFields fields = masks_of(role);
  if (text > 0) {
    fields.joint_query = tensor(text, role.num_heads);
    fields.joint_key = tensor(text, role.num_kv_heads);
    fields.joint_value = tensor(text, role.num_kv_heads);
    fields.joint_strategy = joint_strategy_name(role.joint);
  }
  if (text > 0 || role.mask != MaskKind::none) inputs.metadata = AttentionMetadata(std::move(fields));
  return {problem.name, std::move(inputs)};
}

}  // namespace ditattn::cli
