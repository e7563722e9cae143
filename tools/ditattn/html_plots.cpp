#include "tools/ditattn/html_plots.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "tools/ditattn/html_text.hpp"

namespace ditattn::cli {
namespace {

// In units of the view box, which is as wide as a phone: texts are readable there, and on wide screens plots stand side
// by side instead of growing.
constexpr double kWidth = 360;
constexpr double kRight = 12;
constexpr double kLine = 15;
constexpr double kCharacter = 7.6;  // width of capitals at 11 units, in bold
constexpr double kFarBeyond = 6;    // lines this many times beyond the fastest back end are told in words

// Speeds from left to right, from 0 on.
struct SpeedAxis {
  double left;
  double step = 1;
  double end = 1;
  std::vector<PlotLine> lines = {};   // within
  std::vector<PlotLine> beyond = {};  // outside

  SpeedAxis(const Plot& plot, double left_edge) : left(left_edge) {
    double fastest = 0;
    for (const PlotPoint& point : plot.points) fastest = std::max(fastest, point.speed);
    double last = fastest;
    for (const PlotLine& line : plot.lines) {
      const bool is_within = line.speed <= kFarBeyond * fastest;
      (is_within ? lines : beyond).push_back(line);
      if (is_within) last = std::max(last, line.speed);
    }
    if (!(last > 0) || !std::isfinite(last)) return;
    const double power = std::pow(10, std::floor(std::log10(last / 4)));
    const double ratio = last / 4 / power;
    step = power * (ratio <= 1 ? 1 : ratio <= 2 ? 2 : ratio <= 5 ? 5 : 10);
    end = last * 1.04;
  }

  [[nodiscard]] double at(double speed) const {
    const double share = std::isfinite(speed) ? std::clamp(speed / end, 0.0, 1.0) : 0;
    return left + share * (kWidth - kRight - left);
  }
};

// Errors from bottom to top by decades, with a row for 0 below and one for what is no number above, where they occur.
struct ErrorAxis {
  double top;
  double bottom;
  int first = -7;
  int last = 0;
  bool has_zero = false;
  bool has_nan = false;

  ErrorAxis(const Plot& plot, double top_edge, double bottom_edge) : top(top_edge), bottom(bottom_edge) {
    double least = INFINITY;
    double most = 0;
    const auto add = [&](double error) {
      if (error > 0) {
        least = std::min(least, error);
        most = std::max(most, error);
      }
    };
    for (const PlotPoint& point : plot.points) {
      has_zero |= point.error == 0;
      has_nan |= !std::isfinite(point.error);
      if (std::isfinite(point.error)) add(point.error);
    }
    if (plot.error_bound && std::isfinite(*plot.error_bound)) add(*plot.error_bound);
    if (most == 0) return;
    first = static_cast<int>(std::floor(std::log10(least)));
    last = std::max(static_cast<int>(std::ceil(std::log10(most))), first + 1);
  }

  [[nodiscard]] double at(double error) const {
    if (!std::isfinite(error)) return top;
    if (error <= 0) return bottom;
    const double low = bottom - (has_zero ? 24 : 0);
    const double high = top + (has_nan ? 24 : 0);
    return low - (std::log10(error) - first) / (last - first) * (low - high);
  }
};

std::string text_at(double x, double y, std::string_view css_class, const char* anchor, std::string_view text) {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" class=\"{}\" text-anchor=\"{}\">{}</text>\n", x, y, css_class,
                     anchor, escaped(text));
}

std::string line_at(double x1, double y1, double x2, double y2, std::string_view css_class) {
  return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" class=\"{}\"/>\n", x1, y1, x2, y2,
                     css_class);
}

double width_of(std::string_view text) { return kCharacter * static_cast<double>(text.size()); }

// Ticks, ceilings with their names in rows of their own, and what lies beyond; lines lie under texts. Moves `y` below.
std::string draw_speed_axis(const SpeedAxis& axis, const Plot& plot, double top, double& y) {
  std::string lines = line_at(axis.left, y, kWidth - kRight, y, "axis");
  std::string texts = text_at((axis.left + kWidth - kRight) / 2, y + 27, "tick", "middle", plot.speed_axis);
  for (int i = 0; i * axis.step <= axis.end * 1.0001; ++i) {
    const double x = axis.at(i * axis.step);
    lines += line_at(x, top, x, y, "grid");
    texts += text_at(x, y + 13, "tick", "middle", fmt::format("{:.3g}", i * axis.step));
  }
  const double bottom = y;
  y += 30;
  for (const PlotLine& line : axis.lines) {
    const double x = axis.at(line.speed);
    y += kLine;
    const std::string name = fmt::format("{}: {:.3g}", line.name, line.speed);
    const bool is_left = x - width_of(name) - 4 >= 0;
    lines += line_at(x, top, x, bottom, "ceiling") + line_at(x, bottom, x, y, "leader");
    texts += text_at(is_left ? x - 4 : x + 4, y, "ceiling-name", is_left ? "end" : "start", name);
  }
  for (const PlotLine& line : axis.beyond) {
    y += kLine;
    texts += text_at(kWidth - kRight, y, "ceiling-name", "end",
                     fmt::format("{}: {:.3g}, far beyond this plot →", line.name, line.speed));
  }
  y += 6;
  return lines + texts;
}

std::string svg_of(const Plot& plot, double height, const std::string& content) {
  return fmt::format("<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" aria-label=\"{}\">\n{}</svg>\n", kWidth, height,
                     escaped(plot.title), content);
}

// One shape for each slot: colour is never alone.
std::string marker(int slot, double x, double y) {
  static constexpr std::array<const char*, kBackendSlots> paths = {
      "M-6,0a6,6 0 1,0 12,0a6,6 0 1,0 -12,0z",                          // circle
      "M-5,-5h10v10h-10z",                                              // square
      "M0,-7l6.5,11.5h-13z",                                            // triangle
      "M0,-7l7,7l-7,7l-7,-7z",                                          // diamond
      "M0,7l6.5,-11.5h-13z",                                            // triangle on its head
      "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",                             // plus
      "M-3,-6.5h6l4,6.5l-4,6.5h-6l-4,-6.5z",                            // hexagon
      "M-6,-4l2,-2l4,4l4,-4l2,2l-4,4l4,4l-2,2l-4,-4l-4,4l-2,-2l4,-4z",  // cross
  };
  return fmt::format("<path class=\"mark b{}\" transform=\"translate({:.1f} {:.1f})\" d=\"{}\"/>\n", slot, x, y,
                     paths.at(static_cast<std::size_t>(slot)));
}

struct Box {
  double left;
  double top;
  double right;
  double bottom;
  [[nodiscard]] bool meets(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
};

// Names beside their markers, where neither names nor markers are yet: right or left, then further up or down.
class Labels {
 public:
  explicit Labels(Box room) : room_(room) {}
  void add_marker(double x, double y) { taken_.push_back({x - 7, y - 7, x + 7, y + 7}); }

  std::string add(double x, double y, const std::string& name, bool emphasized) {
    const double width = width_of(name);
    const char* css_class = emphasized ? "name strong" : "name";
    for (const double away : {0.0, 14.0, -14.0, 28.0, -28.0, 42.0, -42.0, 56.0, -56.0, 70.0, -70.0}) {
      for (const bool is_left : {false, true}) {
        const double at = is_left ? x - 9 : x + 9;
        const Box box{is_left ? at - width : at, y + away - 7, is_left ? at : at + width, y + away + 7};
        if (!is_free(box)) continue;
        taken_.push_back(box);
        const std::string leader = std::abs(away) > 14 ? line_at(x, y, at, y + away, "leader") : "";
        return leader + text_at(at, y + away + 4, css_class, is_left ? "end" : "start", name);
      }
    }
    return text_at(kWidth - 2, y + 4, css_class, "end", name);  // no free place: on top of others
  }

 private:
  [[nodiscard]] bool is_free(const Box& box) const {
    return box.left >= room_.left && box.right <= room_.right && box.top >= room_.top && box.bottom <= room_.bottom &&
           std::ranges::none_of(taken_, [&](const Box& other) { return box.meets(other); });
  }

  Box room_;
  std::vector<Box> taken_;
};

}  // namespace

std::string bar_plot(const Plot& plot) {
  if (plot.points.empty()) return {};
  constexpr double top = 6;
  constexpr double pitch = 36;
  constexpr double height = 14;
  const SpeedAxis axis(plot, 5);
  double y = top + pitch * static_cast<double>(plot.points.size());
  std::string svg = draw_speed_axis(axis, plot, top, y);
  double row = top;
  for (const PlotPoint& point : plot.points) {
    svg += fmt::format("<rect class=\"mark {}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{}\"/>\n",
                       backend_class(point.backend), axis.left, row + 17,
                       std::max(axis.at(point.speed) - axis.left, 1.0), height);
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" class=\"name\"><tspan class=\"strong\">{}</tspan> {}</text>\n",
                       axis.left, row + 12, escaped(point.backend),
                       escaped(point.note + (point.emphasized ? ", recommended" : "")));
    row += pitch;
  }
  return svg_of(plot, y, svg);
}

std::string scatter_plot(const Plot& plot) {
  if (plot.points.empty()) return {};
  constexpr double left = 44;
  constexpr double top = 26;
  constexpr double bottom = 216;
  const SpeedAxis speeds(plot, left);
  const ErrorAxis errors(plot, top + 8, bottom - 8);
  double y = bottom;
  std::string svg = text_at(2, 12, "tick", "start", "error (rel_l2)") + draw_speed_axis(speeds, plot, top, y);
  const int stride = (errors.last - errors.first + 7) / 8;
  for (int decade = errors.first; decade <= errors.last; decade += stride) {
    const double at = errors.at(std::pow(10, decade));
    svg += line_at(left, at, kWidth - kRight, at, "grid") +
           text_at(left - 5, at + 4, "tick", "end", fmt::format("1e{}", decade));
  }
  if (errors.has_zero) svg += text_at(left - 5, errors.at(0) + 4, "tick", "end", "0");
  if (errors.has_nan) svg += text_at(left - 5, errors.at(NAN) + 4, "tick", "end", "NaN");
  svg += line_at(left, top, left, bottom, "axis");
  Labels labels({left + 2, 14, kWidth, bottom - 1});
  if (plot.error_bound && *plot.error_bound > 0 && std::isfinite(*plot.error_bound)) {
    const double at = errors.at(*plot.error_bound);
    svg += line_at(left, at, kWidth - kRight, at, "bound") +
           text_at(kWidth - kRight, 12, "ceiling-name", "end", fmt::format("– – bound {:.1e}", *plot.error_bound));
  }
  for (const PlotPoint& point : plot.points) {
    const double x = speeds.at(point.speed);
    svg += marker(backend_slot(point.backend), x, errors.at(point.error));
    labels.add_marker(x, errors.at(point.error));
  }
  for (const PlotPoint& point : plot.points) {
    svg += labels.add(speeds.at(point.speed), errors.at(point.error), point.backend, point.emphasized);
  }
  return svg_of(plot, y, svg);
}

}  // namespace ditattn::cli
