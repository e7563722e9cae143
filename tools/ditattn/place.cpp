#include "tools/ditattn/place.hpp"

#include <fmt/format.h>

#include <cstdlib>
#include <regex>

namespace ditattn::cli {

Place place_of(const std::string& file, const std::string& name, const std::optional<std::string>& layer,
               std::optional<double> timestep) {
  static const std::regex by_step(R"(step(\d{1,9})/(.+))");
  static const std::regex by_level(R"((.+) t=([0-9.eE+-]+))");
  Place place{.file = file, .layer = name, .level = {}, .order = timestep.value_or(0)};
  // A name from a file may be as long as it likes, and std::regex recurses.
  std::smatch parts;
  constexpr std::size_t longest = 1000;
  if (name.size() <= longest && std::regex_match(name, parts, by_step)) {
    place.order = std::strtod(parts[1].str().c_str(), nullptr);
    place.level = fmt::format("step {}", place.order);
    place.layer = parts[2];
  } else if (name.size() <= longest && std::regex_match(name, parts, by_level)) {
    if (!timestep) timestep = std::strtod(parts[2].str().c_str(), nullptr);
    place.order = *timestep;
    place.layer = parts[1];
  }
  if (timestep) place.level = fmt::format("t={:.6g}", *timestep);
  if (layer) place.layer = *layer;
  return place;
}

}  // namespace ditattn::cli
