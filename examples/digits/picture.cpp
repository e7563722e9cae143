#include "picture.hpp"

#include <fmt/format.h>
#include <png.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "font.hpp"

namespace digits {
namespace {

constexpr int kMaxPixel = 16;
constexpr std::uint8_t kPaper = 0xE0;
constexpr std::uint8_t kWhite = 0xFF;
constexpr std::uint8_t kInk = 0;

constexpr int kZoom = 6;      // of a digit's pixels
constexpr int kTextZoom = 2;  // of a letter's pixels
constexpr int kGap = 4;       // between digits
constexpr int kMargin = 12;
constexpr int kCharacter = (kGlyphWidth + 1) * kTextZoom;
constexpr int kLine = (kGlyphHeight + 3) * kTextZoom;

struct Canvas {
  int width;
  int height;
  std::vector<std::uint8_t> pixels = std::vector<std::uint8_t>(static_cast<std::size_t>(width) * height, kPaper);

  void fill(int left, int top, int size, std::uint8_t shade) {
    for (int y = top; y < top + size; ++y) std::fill_n(pixels.begin() + std::ptrdiff_t{y} * width + left, size, shade);
  }

  // What does not fit into the width is left out.
  void write(int left, int top, const std::string& text) {
    for (std::size_t i = 0; i < text.size() && left + kCharacter <= width; ++i, left += kCharacter) {
      for (int row = 0; row < kGlyphHeight; ++row) {
        for (int column = 0; column < kGlyphWidth; ++column) {
          if ((glyph_row(text[i], row) >> (kGlyphWidth - 1 - column) & 1) == 0) continue;
          fill(left + column * kTextZoom, top + row * kTextZoom, kTextZoom, kInk);
        }
      }
    }
  }
};

// Where everything lies; the same for every block, as all have the same classes.
struct Layout {
  int image_size;
  int classes;
  int rows = 0;  // the most samples of one class

  Layout(const ModelConfig& config, const Images& images)
      : image_size(static_cast<int>(config.image_size)), classes(static_cast<int>(config.classes)) {
    for (int c = 0; c < classes; ++c) {
      rows = std::max(rows, static_cast<int>(std::ranges::count(images.classes, std::int64_t{c})));
    }
  }
  [[nodiscard]] int cell() const { return image_size * kZoom + kGap; }
  [[nodiscard]] int block_height() const { return 3 * kLine + rows * cell() + kMargin; }
  [[nodiscard]] int column(int c) const { return kMargin + c * cell(); }
};

void draw_digit(Canvas& canvas, int left, int top, int size, const float* pixels) {
  for (int i = 0; i < size * size; ++i) {
    const auto ink = static_cast<int>(std::lround(pixels[i] * kWhite / kMaxPixel));
    canvas.fill(left + i % size * kZoom, top + i / size * kZoom, kZoom, static_cast<std::uint8_t>(kWhite - ink));
  }
}

void draw_block(Canvas& canvas, int top, const Layout& layout, const Block& block) {
  canvas.write(kMargin, top, block.name);
  canvas.write(kMargin, top + kLine, block.note);
  for (int c = 0; c < layout.classes; ++c) {
    canvas.write(layout.column(c) + (layout.cell() - kGap - kCharacter) / 2, top + 2 * kLine, fmt::to_string(c));
  }
  std::vector<int> drawn(layout.classes, 0);
  const Images& images = block.samples;
  for (std::size_t i = 0; i < images.classes.size(); ++i) {
    const auto c = static_cast<int>(images.classes[i]);
    const int y = top + 3 * kLine + drawn[c]++ * layout.cell();
    draw_digit(canvas, layout.column(c), y, layout.image_size,
               images.pixels.data() + i * layout.image_size * layout.image_size);
  }
}

void write_png(const std::filesystem::path& file, const Canvas& canvas) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(canvas.width);
  image.height = static_cast<png_uint_32>(canvas.height);
  image.format = PNG_FORMAT_GRAY;
  const std::filesystem::path aside = file.string() + fmt::format(".{}.partial", ::getpid());
  std::error_code error;
  std::string reason;
  if (png_image_write_to_file(&image, aside.c_str(), 0, canvas.pixels.data(), canvas.width, nullptr) == 0) {
    reason = image.message;
  } else {
    std::filesystem::rename(aside, file, error);
    if (error) reason = error.message();
  }
  if (reason.empty()) return;
  std::filesystem::remove(aside, error);
  throw ditattn::FileError(fmt::format("Cannot write picture '{}': {}.", file.string(), reason));
}

}  // namespace

Difference compare(const Images& samples, const Images& reference) {
  Difference difference;
  double squares = 0;
  for (std::size_t i = 0; i < samples.pixels.size(); ++i) {
    const double d = std::abs(static_cast<double>(samples.pixels[i]) - static_cast<double>(reference.pixels[i]));
    difference.largest = std::max(difference.largest, d);
    squares += d * d;
  }
  const double mean = squares / static_cast<double>(samples.pixels.size());
  difference.psnr = mean > 0 ? 10 * std::log10(kMaxPixel * kMaxPixel / mean) : std::numeric_limits<double>::infinity();
  return difference;
}

void save_picture(const std::filesystem::path& file, const ModelConfig& config, const std::vector<Block>& blocks) {
  const Layout layout(config, blocks.front().samples);
  Canvas canvas{.width = 2 * kMargin + layout.classes * layout.cell() - kGap,
                .height = kMargin + static_cast<int>(blocks.size()) * layout.block_height()};
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    draw_block(canvas, kMargin + static_cast<int>(i) * layout.block_height(), layout, blocks[i]);
  }
  write_png(file, canvas);
}

}  // namespace digits
