// What a guard found, as text and as JSON.

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cmath>

#include "ditattn/guard.hpp"

namespace ditattn {
namespace {

using Cells = std::array<std::string, 9>;

constexpr std::array kHeader = {"layer",  "role",  "back end", "calls",  "checks",
                                "failed", "worst", "allowed",  "at call"};

std::string notes(const GuardedLayer& layer) {
  std::vector<std::string> notes;
  if (layer.non_finite > 0) notes.push_back(fmt::format("{} elements NaN or infinite", layer.non_finite));
  if (!layer.replaced_by.empty())
    notes.push_back(fmt::format("{} from call {} on", layer.replaced_by, layer.replaced_at));
  if (layer.captured > 0) notes.push_back(fmt::format("{} not checked: captured", layer.captured));
  if (layer.not_checked > 0) notes.push_back(fmt::format("{} not checked: {}", layer.not_checked, layer.reason));
  return fmt::format("{}", fmt::join(notes, "; "));
}

Cells cells_of(const GuardedLayer& layer) {
  const bool is_checked = layer.checks > 0;
  return {layer.layer.empty() ? "-" : layer.layer,
          layer.role.empty() ? "-" : layer.role,
          is_checked ? layer.backend : "-",
          std::to_string(layer.calls),
          std::to_string(layer.checks),
          std::to_string(layer.failures),
          is_checked ? fmt::format("{:.1e}", layer.worst.error) : "-",
          is_checked ? fmt::format("{:.1e}", layer.worst.bound) : "-",
          is_checked ? std::to_string(layer.worst.call) : "-"};
}

nlohmann::json finite(double number) { return std::isfinite(number) ? nlohmann::json(number) : nlohmann::json(); }

nlohmann::json json_of(const GuardFinding& finding) {
  return {{"call", finding.call},
          {"backend", finding.backend},
          {"problem", finding.problem},
          {"error", finite(finding.error)},
          {"bound", finding.bound},
          {"row", {finding.batch, finding.head, finding.query}},
          {"non_finite", finding.non_finite},
          {"without_keys", finding.without_keys},
          {"action", finding.action}};
}

}  // namespace

std::string GuardFinding::text() const {
  std::string text = fmt::format("Guard: {}", layer.empty() ? "a layer" : fmt::format("layer '{}'", layer));
  if (!role.empty()) text += fmt::format(" of role '{}'", role);
  text += fmt::format(", call {}: {} is wrong by {:.1e}, allowed are {:.1e}", call, backend, error, bound);
  if (non_finite > 0) text += fmt::format("; {} elements are NaN or infinite where they should not be", non_finite);
  if (without_keys > 0) text += fmt::format("; {} elements are not zero in rows without keys", without_keys);
  text += fmt::format(" (worst row: batch {}, head {}, query {} of {})", batch, head, query, problem);
  return action.empty() ? text : text + ": " + action;
}

std::uint64_t GuardReport::failures() const {
  std::uint64_t sum = 0;
  for (const GuardedLayer& layer : layers) sum += layer.failures;
  return sum;
}

std::string GuardReport::text() const {
  if (layers.empty()) return "The guard saw no call.\n";
  std::vector<Cells> lines{Cells()};
  std::ranges::copy(kHeader, lines.front().begin());
  for (const GuardedLayer& layer : layers) lines.push_back(cells_of(layer));
  std::array<std::size_t, kHeader.size()> widths{};
  for (const Cells& cells : lines) {
    for (std::size_t i = 0; i < cells.size(); ++i) widths[i] = std::max(widths[i], cells[i].size());
  }
  std::string text;
  for (std::size_t line = 0; line < lines.size(); ++line) {
    std::string row;
    for (std::size_t i = 0; i < widths.size(); ++i) row += fmt::format("{:<{}}  ", lines[line][i], widths[i]);
    row += line == 0 ? "" : notes(layers[line - 1]);
    text += row.substr(0, row.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

std::string GuardReport::json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const GuardedLayer& layer : layers) {
    list.push_back({{"layer", layer.layer},
                    {"role", layer.role},
                    {"backend", layer.backend},
                    {"calls", layer.calls},
                    {"checks", layer.checks},
                    {"failures", layer.failures},
                    {"captured", layer.captured},
                    {"not_checked", layer.not_checked},
                    {"reason", layer.reason},
                    {"last_error", finite(layer.last_error)},
                    {"worst", layer.checks > 0 ? json_of(layer.worst) : nlohmann::json()},
                    {"non_finite", layer.non_finite},
                    {"replaced_by", layer.replaced_by},
                    {"replaced_at", layer.replaced_at}});
  }
  const nlohmann::json report = {{"failures", failures()}, {"layers", list}};
  return report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);  // names may be no UTF-8
}

}  // namespace ditattn
