#include "models/catalogue.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <utility>

#include "core/json_fields.hpp"
#include "core/text.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

using nlohmann::json;

constexpr const char* kDocument = "Catalogue of models:";

std::string names_of(const std::vector<Model>& all) {
  std::vector<std::string_view> names;
  names.reserve(all.size());
  for (const Model& model : all) names.push_back(model.name);
  return fmt::format("{}", fmt::join(names, ", "));
}

// Text tokens that a joint role adds: the sum of context.text's parts.
std::int64_t text_tokens(const JsonFields& model) {
  const json& context = model.at("context");
  if (!context.is_object() || !context.contains("text")) model.fail("joins text, but its 'context' has no 'text'");
  const json& parts = context["text"];
  if (!parts.is_array() || parts.empty()) model.fail("has 'context.text', which is not a list of lengths");
  std::int64_t sum = 0;
  for (const json& part : parts) sum += model.count_in(part, "context.text");
  return sum;
}

// What a role says for every resolution.
ModelRole parse_role(const json& object, const JsonFields& model) {
  const JsonFields fields(object, fmt::format("{}, {}", model.place(), label("role", object, "role")),
                          {"role", "category", "layers", "heads", "kv_heads", "head_size", "hidden_size", "query",
                           "key", "joint", "mask", "mask_note"});
  ModelRole role;
  role.role = fields.text("role");
  role.category = fields.one_of("category", {"self", "cross"});
  role.layers = fields.count("layers");
  role.batch = model.count("batch");
  role.num_heads = fields.count("heads");
  role.num_kv_heads = fields.count("kv_heads");
  if (role.num_heads % role.num_kv_heads != 0) {
    fields.fail(fmt::format("has {} heads, not a multiple of its {} K/V heads", role.num_heads, role.num_kv_heads));
  }
  role.head_size = fields.count("head_size");
  constexpr JointStrategy strategies[] = {JointStrategy::none, JointStrategy::front, JointStrategy::rear};
  role.joint = strategies[fields.choice("joint", {"none", "front", "rear"})];
  if (role.joint != JointStrategy::none) role.joint_tokens = text_tokens(model);
  role.mask = parse_mask_kind(fields.one_of("mask", {"none", "padding", "bool", "additive"}));
  role.mask_note = fields.optional_text("mask_note");
  return role;
}

// Adds a resolution and, with its lengths, every role at it.
void parse_resolution(const json& object, const JsonFields& fields, const std::vector<ModelRole>& roles, Model& model) {
  const JsonFields own(object, fmt::format("{}, {}", fields.place(), label("resolution", object, "name")),
                       {"name", "width", "height", "frames", "fps", "lengths"});
  const ModelResolution resolution{.name = own.text("name"),
                                   .width = own.count("width"),
                                   .height = own.count("height"),
                                   .frames = own.count("frames")};
  model.resolutions.push_back(resolution);
  const json& lengths = own.at("lengths");
  if (!lengths.is_object() || lengths.size() != roles.size()) own.fail("does not have one entry of 'lengths' per role");
  for (ModelRole role : roles) {
    const auto found = lengths.find(role.role);
    if (found == lengths.end() || !found->is_array() || found->size() != 2) {
      own.fail(fmt::format("has no [Sq, Skv] in 'lengths' for the role '{}'", role.role));
    }
    role.resolution = resolution.name;
    role.seq_q = own.count_in((*found)[0], role.role);
    role.seq_kv = own.count_in((*found)[1], role.role);
    model.roles.push_back(std::move(role));
  }
}

// The parts of a model that say where its figures come from.
void parse_provenance(const JsonFields& fields, Model& model) {
  model.arithmetic = fields.text("arithmetic");
  for (const json& source : fields.list("source")) {
    if (!source.is_string() || source.get<std::string>().empty()) fields.fail("has a 'source' that is not a text");
    model.source.push_back(source.get<std::string>());
  }
  model.verified = fields.flag("verified");
  model.unverified = fields.optional_text("unverified");
  if (model.verified != model.unverified.empty())
    fields.fail("must say what is 'unverified' exactly if not 'verified'");
  model.notes = fields.optional_text("notes");
}

Model parse_model(const json& object) {
  const JsonFields fields(object, fmt::format("{} {}", kDocument, label("model", object, "name")),
                          {"name", "family", "hidden_size", "vae_spatial", "vae_temporal", "patch", "context",
                           "text_length", "audio_latents_per_second", "batch", "guidance", "layout", "roles",
                           "resolutions", "arithmetic", "source", "verified", "unverified", "notes"});
  Model model;
  model.name = fields.text("name");
  model.family = fields.text("family");
  model.hidden_size = fields.count("hidden_size");
  model.guidance = fields.one_of("guidance", {"none", "embedded", "separate", "batched"});
  model.layout = fields.one_of("layout", {"BSHD", "BHSD"});
  model.text_at_most = fields.choice("text_length", {"none", "padded", "at_most"}) == 2;
  std::vector<ModelRole> roles;
  for (const json& role : fields.list("roles")) roles.push_back(parse_role(role, fields));
  for (const json& resolution : fields.list("resolutions")) parse_resolution(resolution, fields, roles, model);
  parse_provenance(fields, model);
  return model;
}

const Model* find(const std::vector<Model>& all, std::string_view name) {
  const auto found = std::ranges::find_if(all, [&](const Model& model) { return same_name(model.name, name); });
  return found == all.end() ? nullptr : &*found;
}

}  // namespace

const char* joint_strategy_name(JointStrategy strategy) {
  switch (strategy) {
    case JointStrategy::front:
      return "front";
    case JointStrategy::rear:
      return "rear";
    default:
      return "none";
  }
}

std::vector<Model> parse_models(std::string_view text) {
  json document;
  try {
    document = json::parse(text);
  } catch (const json::exception& error) {
    throw ValueError(fmt::format("{} not JSON: {}", kDocument, error.what()));
  }
  const JsonFields fields(document, fmt::format("{} the document", kDocument), {"models", "short_names"});
  std::vector<Model> all;
  for (const json& object : fields.list("models")) {
    Model model = parse_model(object);
    if (find(all, model.name) != nullptr) fields.fail(fmt::format("has two models named '{}'", model.name));
    all.push_back(std::move(model));
  }
  return all;
}

const std::vector<Model>& models() {
  static const std::vector<Model> all = parse_models(models_json());
  return all;
}

std::string full_name(std::string_view name) {
  static const json names = json::parse(models_json())["short_names"];
  for (const auto& [known, full] : names.items()) {
    if (same_name(known, name)) return full.get<std::string>();
  }
  return std::string(name);
}

const Model& find_model(std::string_view name) {
  const Model* found = find(models(), name);
  if (found == nullptr) {
    throw ValueError(fmt::format("Unknown model: '{}'. Valid models are: {}", name, names_of(models())));
  }
  return *found;
}

Problem to_problem(const ModelRole& role, DLDataType dtype, DLDevice device) {
  return {.batch = role.batch,
          .num_heads = role.num_heads,
          .num_kv_heads = role.num_kv_heads,
          .seq_q = role.seq_q,
          .seq_kv = role.seq_kv,
          .head_size = role.head_size,
          .dtype = dtype,
          .device = device,
          .mask = role.mask,
          .joint = role.joint_tokens > 0};
}

}  // namespace ditattn
