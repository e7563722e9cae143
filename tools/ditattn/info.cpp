// `ditattn info NAME`: everything about one backend.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>

#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/table.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

const char* alignment_name(CausalAlignment alignment) {
  return alignment == CausalAlignment::top_left ? "top-left" : "bottom-right";
}

// The files a class path can come from, in search order, with whether each is there.
Json searched_files(const BackendInfo& info) {
  Json files = Json::array();
  if (info.class_path.empty()) return files;
  std::string relative = info.member.get_path(false);
  std::ranges::replace(relative, '.', '/');
  for (const std::string& directory : plugin_search_path()) {
    const std::filesystem::path file = std::filesystem::path(directory) / (relative + ".so");
    std::error_code error;
    files.push_back({{"file", file.string()}, {"exists", std::filesystem::exists(file, error)}});
  }
  return files;
}

Json describe(const BackendInfo& info) {
  Json document = to_json(info);
  const Capabilities can = info.backend ? info.backend->capabilities() : Capabilities{};
  const auto known = [&](Json value) { return info.backend ? std::move(value) : Json(nullptr); };
  document["reported_name"] = known(info.backend ? info.backend->get_name() : "");
  document["causal_alignment"] = known(alignment_name(can.causal_alignment));
  document["graph_safe"] = known(can.graph_safe);
  document["masked_nan"] = known(can.masked_nan_propagates ? "propagates" : "hidden");
  document["looked_in"] = searched_files(info);
  return document;
}

std::string text_of(const Json& value) {
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (value.is_string()) return value.get<std::string>();
  if (value.is_null()) return "unknown";
  return fmt::format("{}", fmt::join(value.get<std::vector<std::string>>(), ", "));
}

std::string text_document(const BackendInfo& info, const Json& document) {
  Table table{.columns = {{"backend"}, {info.member.name()}}, .rows = {}};
  const auto add = [&](const char* label, std::string text) { table.rows.push_back({{label}, {std::move(text)}}); };
  add("class path", info.class_path.empty() ? "none: to be registered by you" : info.class_path);
  add("default path", info.member.value().empty() ? "none" : info.member.value());
  add("overridden", text_of(document["overridden"]));
  add("available", info.available ? "yes" : "no");
  if (info.backend) {
    add("engine", info.engine());
    add("reported name", info.backend->get_name());
    add("devices", text_of(document["devices"]));
    add("dtypes", text_of(document["dtypes"]));
    add("head sizes", info.backend->capabilities().head_sizes.describe());
    add("masks", text_of(document["masks"]));
    for (const char* ability : {"gqa", "causal"}) add(ability, text_of(document[ability]));
    add("causal, Sq != Skv", text_of(document["causal_alignment"]));
    add("log-sum-exp", text_of(document["lse"]));
    add("graph safe", text_of(document["graph_safe"]));
    add("masked NaN", text_of(document["masked_nan"]));
  }
  for (const Json& place : document["looked_in"]) {
    add("looked in",
        fmt::format("{} ({})", place["file"].get<std::string>(), place["exists"].get<bool>() ? "there" : "not there"));
  }
  std::string text = format_table(table, use_colour());
  if (!info.available) text += "\nNot available: " + printable(info.reason) + "\n";
  return text;
}

int info(const std::string& name, bool json) {
  const BackendInfo info = inspect(parse_member(name));
  const Json document = describe(info);
  if (json) {
    print_json(document);
  } else {
    print(text_document(info, document));
  }
  return kDone;
}

struct Options {
  std::string name;
  bool json = false;
};

}  // namespace

void add_info_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand("info", "Tell everything about one backend, and why it cannot run here if so");
  auto options = std::make_shared<Options>();
  verb->add_option("NAME", options->name, "The backend, in any case")->required();
  add_json_flag(*verb, options->json);
  verb->callback([&action, options] { action = [options] { return info(options->name, options->json); }; });
}

}  // namespace ditattn::cli
