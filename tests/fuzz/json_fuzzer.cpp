// Texts that users write or keep: each is given to everything that reads JSON. What begins with no "{" is flags too: a
// line "KEY VALUE" each.

#include <ditattn/attention_config.hpp>
#include <ditattn/planner.hpp>

#include <sstream>

#include "tests/fuzz/fuzzing.hpp"
#include "tuner/tune_cache.hpp"

namespace {

using ditattn::fuzzing::allow_errors;

void read_config(const std::string& text) {
  allow_errors([&] {
    for (const auto& [role, spec] : ditattn::AttentionConfig::from_json(text).per_role) {
      ditattn::fuzzing::require(!role.empty() && !spec.backend.empty(), "roles and backends have names");
    }
  });
}

void read_flags(const std::string& text) {
  ditattn::AttentionFlags flags;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t space = line.find(' ');
    const std::string value = space == std::string::npos ? "" : line.substr(space + 1);
    if (line.starts_with("backend ")) {
      flags.backend = value;
    } else if (line.starts_with("config {")) {  // not a file's name
      flags.config = value;
    } else {
      flags.settings.emplace_back(line.substr(0, space), value);
    }
  }
  allow_errors([&] { static_cast<void>(ditattn::config_from_flags(flags)); });
}

// Figures that are taken are used: for a mesh of GPUs, inside a node and over nodes.
void read_figures(const std::string& text) {
  allow_errors([&] {
    const auto figures = ditattn::planner::parse_figures(text);
    for (const auto& link : figures.links) {
      allow_errors([&] {
        const ditattn::Problem problem{
            .num_heads = 24, .num_kv_heads = 24, .seq_q = 4096, .seq_kv = 4096, .head_size = 128};
        const auto& gpu = figures.gpus.front();
        const auto plan = ditattn::planner::make_plan(
            {.problem = problem, .gpus = 8, .link = link.name, .gpu = gpu.name, .backend = gpu.kernels.front().backend},
            figures);
        static_cast<void>(ditattn::planner::explain_best(plan));
      });
    }
  });
}

// Publishing reads what is there, and writes it back with one problem more.
void read_tune_cache(const std::string& text) {
  static const std::filesystem::path file = ditattn::fuzzing::scratch_file("tuned.json");
  const ditattn::TunedFor here{{"device", "cpu"}};
  ditattn::fuzzing::write_file(file, text.data(), text.size());
  const auto problems = ditattn::read_tune_cache(file, here, true);
  ditattn::publish_tuned(file, here, problems);
  ditattn::fuzzing::require(ditattn::read_tune_cache(file, here, true).size() <= problems.size(),
                            "nothing is added to what was measured");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  read_config(text);
  if (!text.starts_with('{')) read_flags(text);
  read_figures(text);
  read_tune_cache(text);
  return 0;
}
