// `ditattn doctor`: what this machine has, and why each back end can or cannot be used here.
//
// The document of `--json`; "reason", "note", "remedy" and "file" are null where there is nothing to say:
//   machine      object: that of `compare`, with "threads" null where DITATTN_NUM_THREADS is wrong; "cpu_features",
//                name → boolean; "best_cpu_level" of this CPU; "cpu_level" in effect, null where DITATTN_CPU_LEVEL is
//                wrong
//   library      object: "version", "interface_version", "file"; "search_path", list of {"directory", "exists"};
//                "ignored", list of {"entry", "reason"}
//   environment  list of {"name", "value" (null: not set), "note" (what is wrong with it)}
//   libraries    list of {"name", "sonames", "found", "file", "reason", "purpose", "used_by" (back ends of this
//                version), "install"}
//   devices      list of {"name", "present", "usable", "reason", "evidence" (files that show it)}
//   backends     list of {"name", "class_path", "overridden", "available", "engine", "reason", "remedy"}
//   defaults     list of {"device", "candidates" (list of {"backend", "accepted", "reason"}), "platform_default",
//                "explicit" (null, or {"source", "value", "reason" (why it cannot be followed)}), "in_effect" (null
//                where nothing can be used), "tuned" (null where a variable is wrong, or {"problems" (number), "file"
//                (theirs, there or not)})}
//   launches     list of {"role", "backend", "calls"}: what computed in this process so far, which is of interest where
//                the command is called in a process of Python

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/diagnosis.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/flags.hpp"
#include "tools/ditattn/table.hpp"
#include "tools/ditattn/verbs.hpp"

namespace ditattn::cli {
namespace {

// Text of the document, printable. In a table it must stay on its line, whatever an environment variable holds.
std::string text_of(const Json& value) { return value.is_null() ? "" : printable(value.get<std::string>()); }

std::string line_of(const Json& value) {
  std::string text = text_of(value);
  std::ranges::replace(text, '\n', '?');
  return text;
}

Cell yes_or_no(const Json& value) {
  return value.get<bool>() ? Cell{"yes", Emphasis::good} : Cell{"no", Emphasis::faint};
}

std::string indented(std::string text, const std::string& indent) {
  for (std::size_t at = text.find('\n'); at != std::string::npos; at = text.find('\n', at + 1))
    text.insert(at + 1, indent);
  return text;
}

// Two columns: what, and what is known of it.
class Section {
 public:
  explicit Section(const char* title) : table_{.columns = {{title}, {""}}, .rows = {}} {}
  void add(const std::string& label, Cell cell) { table_.rows.push_back({{label}, std::move(cell)}); }
  [[nodiscard]] std::string text() const { return format_table(table_, use_colour()) + "\n"; }

 private:
  Table table_;
};

std::string machine_text(const Json& machine) {
  std::vector<std::string> there;
  std::vector<std::string> missing;
  for (const auto& [feature, has] : machine["cpu_features"].items())
    (has.get<bool>() ? there : missing).push_back(feature);
  Section section("machine");
  section.add("CPU", {line_of(machine["cpu"])});
  section.add("CPU features", {fmt::format("{}", fmt::join(there, " "))});
  if (!missing.empty()) section.add("not there", {fmt::format("{}", fmt::join(missing, " "))});
  const std::string best = text_of(machine["best_cpu_level"]);
  section.add("kernel level", machine["cpu_level"].is_null()
                                  ? Cell{"none: DITATTN_CPU_LEVEL is wrong", Emphasis::bad}
                                  : Cell{fmt::format("{} (best here: {})", text_of(machine["cpu_level"]), best)});
  section.add("threads", machine["threads"].is_null() ? Cell{"unknown: DITATTN_NUM_THREADS is wrong", Emphasis::bad}
                                                      : Cell{machine["threads"].dump()});
  section.add("memory", {fmt::format("{:.0f} GB", machine["memory_gb"].get<double>())});
  section.add("system", {line_of(machine["os"])});
  return section.text();
}

std::string library_text(const Json& library) {
  Section section("library");
  section.add("version", {fmt::format("{}, plug-in interface {}", text_of(library["version"]),
                                      library["interface_version"].get<int>())});
  section.add("file", {line_of(library["file"])});
  for (const Json& place : library["search_path"]) {
    const bool there = place["exists"].get<bool>();
    section.add("plug-ins in", {line_of(place["directory"]) + (there ? "" : " (no such directory)"),
                                there ? Emphasis::none : Emphasis::bad});
  }
  for (const Json& entry : library["ignored"]) {
    section.add("ignored", {fmt::format("'{}': {}", line_of(entry["entry"]), text_of(entry["reason"])), Emphasis::bad});
  }
  return section.text();
}

std::string environment_text(const Json& variables) {
  Section section("environment");
  for (const Json& variable : variables) {
    const bool set = !variable["value"].is_null();
    section.add(text_of(variable["name"]),
                set ? Cell{"'" + line_of(variable["value"]) + "'"} : Cell{"not set", Emphasis::faint});
    if (!variable["note"].is_null()) section.add("", {"note: " + line_of(variable["note"]), Emphasis::bad});
  }
  return section.text();
}

std::string libraries_text(const Json& libraries) {
  Table table{.columns = {{"optional library"}, {"there"}, {"file, or why not"}, {"for"}, {"used by"}}, .rows = {}};
  bool none_used = true;
  std::string to_install;
  for (const Json& library : libraries) {
    const bool found = library["found"].get<bool>();
    table.rows.push_back({{text_of(library["name"])},
                          yes_or_no(library["found"]),
                          {line_of(found ? library["file"] : library["reason"])},
                          {text_of(library["purpose"])},
                          {fmt::format("{}", fmt::join(library["used_by"].get<std::vector<std::string>>(), " "))}});
    none_used = none_used && library["used_by"].empty();
    if (!found) to_install += fmt::format("To have {}: {}\n", text_of(library["name"]), text_of(library["install"]));
  }
  std::string text = format_table(table, use_colour());
  if (none_used) text += "This version uses none of them yet: its back ends compute on the CPU, and need nothing.\n";
  return text + to_install + "\n";
}

std::string devices_text(const Json& devices) {
  Table table{.columns = {{"device"}, {"there"}, {"usable"}, {"why not"}}, .rows = {}};
  for (const Json& device : devices) {
    table.rows.push_back({{text_of(device["name"])},
                          yes_or_no(device["present"]),
                          yes_or_no(device["usable"]),
                          {line_of(device["reason"])}});
  }
  return format_table(table, use_colour()) + "\n";
}

std::string backends_text(const Json& backends) {
  Table table{.columns = {{"backend"}, {"available"}, {"engine"}, {"class path"}}, .rows = {}};
  std::string reasons;
  for (const Json& backend : backends) {
    const bool overridden = backend["overridden"].get<bool>();
    table.rows.push_back({{text_of(backend["name"])},
                          yes_or_no(backend["available"]),
                          {line_of(backend["engine"])},
                          {line_of(backend["class_path"]) + (overridden ? " (overridden)" : "")}});
    if (backend["available"].get<bool>()) continue;
    reasons += fmt::format("\n{} is not available\n  why:    {}\n  remedy: {}\n", text_of(backend["name"]),
                           indented(text_of(backend["reason"]), "          "), text_of(backend["remedy"]));
  }
  return format_table(table, use_colour()) + reasons + "\n";
}

std::string default_text(const Json& entry) {
  Section section("default");
  section.add("device", {text_of(entry["device"])});
  for (const Json& candidate : entry["candidates"]) {
    const bool accepted = candidate["accepted"].get<bool>();
    section.add("candidate", {fmt::format("{}: {}", text_of(candidate["backend"]),
                                          accepted ? "accepted" : short_reason(text_of(candidate["reason"]))),
                              accepted ? Emphasis::none : Emphasis::faint});
  }
  const Json& choice = entry["explicit"];
  if (!choice.is_null()) {
    section.add("explicit", {fmt::format("{}='{}'{}", text_of(choice["source"]), line_of(choice["value"]),
                                         choice["reason"].is_null() ? "" : ", which cannot be followed"),
                             choice["reason"].is_null() ? Emphasis::none : Emphasis::bad});
  }
  const char* source = choice.is_null() ? "platform default" : "explicit, never replaced";
  section.add("in effect", entry["in_effect"].is_null()
                               ? Cell{choice.is_null() ? "none: no candidate is available"
                                                       : "none: an explicit choice is never replaced",
                                      Emphasis::bad}
                               : Cell{fmt::format("{} ({})", text_of(entry["in_effect"]), source), Emphasis::good});
  const Json& tuned = entry["tuned"];
  if (!tuned.is_null() && tuned["problems"] > 0) {
    section.add("tuned", {fmt::format("problems: {}, in {}", tuned["problems"].dump(), line_of(tuned["file"]))});
  }
  return section.text();
}

std::string launches_text(const Json& launches) {
  Table table{.columns = {{"launches, by role"}, {"back end"}, {"calls", true}}, .rows = {}};
  for (const Json& entry : launches) {
    const std::string role = line_of(entry["role"]);
    table.rows.push_back({{role.empty() ? "(none)" : role},
                          {line_of(entry["backend"])},
                          {std::to_string(entry["calls"].get<std::uint64_t>())}});
  }
  return format_table(table, use_colour()) + "\n";
}

std::string text_document(const Json& document) {
  std::string text = machine_text(document["machine"]) + library_text(document["library"]) +
                     environment_text(document["environment"]) + libraries_text(document["libraries"]) +
                     devices_text(document["devices"]) + backends_text(document["backends"]);
  for (const Json& entry : document["defaults"]) text += default_text(entry);
  if (!document["launches"].empty()) text += launches_text(document["launches"]);
  text.pop_back();  // the empty line after the last section
  return text;
}

int doctor(bool json) {
  const Json document = diagnose();
  if (json) {
    print_json(document);
  } else {
    print(text_document(document));
  }
  return kDone;
}

}  // namespace

void add_doctor_verb(CLI::App& app, Action& action) {
  CLI::App* verb = app.add_subcommand(
      "doctor", "Tell what this machine has, why each backend can or cannot be used, and what to do");
  auto json = std::make_shared<bool>(false);
  add_json_flag(*verb, *json);
  verb->callback([&action, json] { action = [json] { return doctor(*json); }; });
}

}  // namespace ditattn::cli
