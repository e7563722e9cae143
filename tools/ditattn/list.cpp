// `ditattn list`: every member of the registry, in its order, available or not.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/table.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

Cell yes_or_no(const BackendInfo& info, bool Capabilities::*ability) {
  if (!info.backend) return {};
  return {info.backend->capabilities().*ability ? "yes" : "no"};
}

std::vector<Cell> row(const BackendInfo& info) {
  const Capabilities can = info.backend ? info.backend->capabilities() : Capabilities{};
  std::vector<std::string> dtypes;
  dtypes.reserve(can.dtypes.size());
  for (const DLDataType dtype : can.dtypes) dtypes.push_back(dtype_name(dtype));
  return {{info.member.name()},
          info.available ? Cell{"yes", Emphasis::good} : Cell{"no", Emphasis::faint},
          info.available ? Cell{can.engine} : Cell{short_reason(info.reason), Emphasis::faint},
          {fmt::format("{}", fmt::join(can.devices, " "))},
          {fmt::format("{}", fmt::join(dtypes, " "))},
          {info.backend ? can.head_sizes.describe() : ""},
          {fmt::format("{}", fmt::join(can.masks, " "))},
          yes_or_no(info, &Capabilities::gqa),
          yes_or_no(info, &Capabilities::causal),
          yes_or_no(info, &Capabilities::lse)};
}

int list(bool json) {
  Json backends = Json::array();
  Table table{.columns = {{"backend"},
                          {"available"},
                          {"engine, or why not"},
                          {"devices"},
                          {"dtypes"},
                          {"head sizes"},
                          {"masks"},
                          {"GQA"},
                          {"causal"},
                          {"LSE"}},
              .rows = {}};
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    const BackendInfo info = inspect(member);
    backends.push_back(to_json(info));
    table.rows.push_back(row(info));
  }
  if (json) {
    print_json({{"backends", backends}});
  } else {
    print(format_table(table, use_colour()));
  }
  return kDone;
}

}  // namespace

void add_list_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand("list", "List every backend: whether it can run here, and what it supports");
  auto json = std::make_shared<bool>(false);
  add_json_flag(*verb, *json);
  verb->callback([&action, json] { action = [json] { return list(*json); }; });
}

}  // namespace ditattn::cli
