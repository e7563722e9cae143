#pragma once

#include <optional>
#include <string>
#include <vector>

namespace ditattn::cli {

/// One back end in a plot.
struct PlotPoint {
  std::string backend;
  double speed = 0;         ///< what is plotted, larger is faster
  std::string note;         ///< the same for people: "0.286 TFLOP/s, 33.8 ms"
  double error = 0;         ///< may be 0, infinite or NaN
  bool emphasized = false;  ///< recommended
};

/// A line across the speeds. One far beyond the bars is told in words instead.
struct PlotLine {
  std::string name;
  double speed = 0;
};

struct Plot {
  std::string title;       ///< what is shown, for those who cannot see it
  std::string speed_axis;  ///< "TFLOP/s"
  std::vector<PlotPoint> points;
  std::vector<PlotLine> lines;
  std::optional<double> error_bound = {};  ///< a line across the errors
};

/// Inline SVG that is as wide as there is room. Empty without points. All texts are escaped, all coordinates finite.
std::string bar_plot(const Plot& plot);

/// Errors on a logarithmic axis against speeds; an error of 0 lies at the bottom, one that is no number at the top.
std::string scatter_plot(const Plot& plot);

}  // namespace ditattn::cli
