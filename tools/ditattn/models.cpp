// `ditattn models [NAME]`: the catalogue of what real models ask of attention.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/model_cases.hpp"
#include "tools/ditattn/output.hpp"
#include "tools/ditattn/table.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

Json to_json(const ModelRole& role) {
  return {{"role", role.role},
          {"category", role.category},
          {"resolution", role.resolution},
          {"shape", {role.batch, role.num_heads, role.seq_q, role.seq_kv, role.head_size}},
          {"kv_heads", role.num_kv_heads},
          {"layers", role.layers},
          {"mask", mask_kind_name(role.mask)},
          {"mask_note", role.mask_note},
          {"joint", joint_strategy_name(role.joint)},
          {"joint_tokens", role.joint_tokens}};
}

Json to_json(const Model& model) {
  Json resolutions = Json::array();
  for (const ModelResolution& size : model.resolutions) {
    resolutions.push_back(
        {{"name", size.name}, {"width", size.width}, {"height", size.height}, {"frames", size.frames}});
  }
  Json roles = Json::array();
  for (const ModelRole& role : model.roles) roles.push_back(to_json(role));
  return {{"name", model.name},         {"family", model.family},         {"hidden_size", model.hidden_size},
          {"guidance", model.guidance}, {"layout", model.layout},         {"text_at_most", model.text_at_most},
          {"verified", model.verified}, {"unverified", model.unverified}, {"arithmetic", model.arithmetic},
          {"source", model.source},     {"notes", model.notes},           {"resolutions", std::move(resolutions)},
          {"roles", std::move(roles)}};
}

std::vector<Cell> row(const Model& model, const ModelRole& role) {
  const bool joint = role.joint != JointStrategy::none;
  return {{model.name + (model.verified ? "" : "*")},
          {role.resolution},
          {role.role},
          {std::to_string(role.batch)},
          {std::to_string(role.num_heads)},
          {std::to_string(role.seq_q)},
          {std::to_string(role.seq_kv)},
          {std::to_string(role.head_size)},
          {role.num_kv_heads == role.num_heads ? "" : std::to_string(role.num_kv_heads)},
          {std::to_string(role.layers)},
          {mask_kind_name(role.mask)},
          {joint ? fmt::format("{} {}", joint_strategy_name(role.joint), role.joint_tokens) : "none"},
          {model.guidance}};
}

Table table_of(const std::vector<Model>& selected) {
  Table table{.columns = {{"model"},
                          {"resolution"},
                          {"role"},
                          {"B", true},
                          {"H", true},
                          {"Sq", true},
                          {"Skv", true},
                          {"D", true},
                          {"Hkv", true},
                          {"layers", true},
                          {"mask"},
                          {"joint"},
                          {"guidance"}},
              .rows = {}};
  for (const Model& model : selected) {
    for (const ModelRole& role : model.roles) table.rows.push_back(row(model, role));
  }
  return table;
}

// What the table has no room for.
std::string details(const Model& model) {
  Table table{.columns = {{"model"}, {model.name}}, .rows = {}};
  const auto add = [&](const std::string& label, const std::string& text) {
    if (!text.empty()) table.rows.push_back({{label}, {text}});
  };
  add("family", model.family);
  add("hidden size", std::to_string(model.hidden_size));
  add("guidance", model.guidance);
  add("layout", model.layout);
  add("text length", model.text_at_most ? "at most what the table says" : "");
  for (const ModelResolution& size : model.resolutions) {
    add("resolution", fmt::format("{}: {} x {} pixels, {} frame{}", size.name, size.width, size.height, size.frames,
                                  size.frames == 1 ? "" : "s"));
  }
  add("arithmetic", model.arithmetic);
  for (const ModelRole& role : model.roles) {
    if (role.resolution == model.resolutions.front().name) add("mask of " + role.role, role.mask_note);
  }
  for (const std::string& source : model.source) add("source", source);
  add("not verified", model.unverified);
  add("notes", model.notes);
  return format_table(table, use_colour());
}

int show_models(const std::string& name, bool json) {
  const std::vector<Model> selected = name.empty() ? models() : std::vector{model_named(name)};
  if (json) {
    Json documents = Json::array();
    for (const Model& model : selected) documents.push_back(to_json(model));
    print_json({{"models", std::move(documents)}});
    return kDone;
  }
  std::string text = name.empty() ? "" : details(selected.front()) + "\n";
  text += format_table(table_of(selected), use_colour());
  if (name.empty()) text += "\n* not verified in full: `ditattn models NAME` says what\n";
  print(text);
  return kDone;
}

struct Options {
  std::string name;
  bool json = false;
};

}  // namespace

void add_models_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand("models", "List what real models ask of attention, or tell about one");
  auto options = std::make_shared<Options>();
  verb->add_option("NAME", options->name, "The model, in any case (default: all)");
  add_json_flag(*verb, options->json);
  verb->callback([&action, options] { action = [options] { return show_models(options->name, options->json); }; });
}

}  // namespace ditattn::cli
