#include "sampler.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace digits {
namespace {

// Images sampled together: enough work for all threads, and the buffers stay below 30 MB.
constexpr std::int64_t kBatch = 32;

constexpr float kMaxPixel = 16;

// One step of Euler's method on a batch. The model sees the batch twice: with its classes and with none.
void step(Model& model, const AttentionLayers& attention, std::span<float> x, std::span<const std::int64_t> classes,
          float t, const SamplerOptions& options, const AttentionObserver& observe) {
  std::vector<float> twice(x.begin(), x.end());
  twice.insert(twice.end(), x.begin(), x.end());
  std::vector<std::int64_t> both(classes.begin(), classes.end());
  both.resize(2 * classes.size(), model.config().classes);
  std::vector<float> velocity(twice.size());
  model.velocity(twice, t, both, attention, velocity, observe);

  const auto guidance = static_cast<float>(options.guidance);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float given = velocity[i];
    const float null = velocity[x.size() + i];
    x[i] -= (null + guidance * (given - null)) / static_cast<float>(options.steps);
  }
}

// The tensor `name` of a file of samples, checked.
ditattn::Tensor required_tensor(const std::filesystem::path& file, const ditattn::SafetensorsFile& content,
                                const std::string& name, DLDataType dtype, std::vector<std::int64_t> shape) {
  const auto fail = [&](const std::string& what) {
    throw ditattn::FileError(fmt::format(
        "Noise file '{}': {}. `train.py --sample` and `digits --samples` write such files.", file.string(), what));
  };
  const auto entry = content.tensors.find(name);
  if (entry == content.tensors.end()) fail(fmt::format("tensor '{}' is missing", name));
  const ditattn::Tensor& tensor = entry->second;
  if (tensor.ndim() > 0) shape[0] = tensor.size(0);
  if (ditattn::shape_name(tensor) != ditattn::shape_name(shape)) {
    fail(fmt::format("tensor '{}' has shape {}, expected {} for any N", name, ditattn::shape_name(tensor),
                     shape.size() == 1 ? "(N,)" : fmt::format("(N, {}, {})", shape[1], shape[2])));
  }
  if (tensor.dtype() != dtype) {
    fail(fmt::format("tensor '{}' is {}, expected {}", name, ditattn::dtype_name(tensor.dtype()),
                     ditattn::dtype_name(dtype)));
  }
  return tensor;
}

ditattn::Tensor image_tensor(const Images& images, const ModelConfig& config) {
  ditattn::Tensor tensor = ditattn::empty(
      {static_cast<std::int64_t>(images.classes.size()), config.image_size, config.image_size}, ditattn::kFloat32);
  std::ranges::copy(images.pixels, static_cast<float*>(tensor.data_ptr()));
  return tensor;
}

}  // namespace

Images draw_noise(const ModelConfig& config, std::int64_t seed, std::int64_t count) {
  std::mt19937_64 generator(static_cast<std::uint64_t>(seed));
  std::normal_distribution<float> normal;
  Images noise;
  for (std::int64_t image = 0; image < count; ++image) noise.classes.push_back(image % config.classes);
  noise.pixels.resize(count * config.tokens());
  std::ranges::generate(noise.pixels, [&] { return normal(generator); });
  return noise;
}

Images load_noise(const std::filesystem::path& file, const ModelConfig& config, std::optional<std::int64_t> count) {
  const ditattn::SafetensorsFile content = ditattn::load_safetensors(file);
  const ditattn::Tensor noise =
      required_tensor(file, content, "noise", ditattn::kFloat32, {0, config.image_size, config.image_size});
  const ditattn::Tensor labels = required_tensor(file, content, "labels", ditattn::kInt64, {0});
  const std::int64_t images = count.value_or(noise.size(0));
  if (images < 1 || images > noise.size(0) || noise.size(0) != labels.size(0)) {
    throw ditattn::FileError(fmt::format("Noise file '{}' holds {} images and {} labels; {} of each are needed.",
                                         file.string(), noise.size(0), labels.size(0),
                                         std::max<std::int64_t>(images, 1)));
  }
  const auto* first_class = static_cast<const std::int64_t*>(labels.data_ptr());
  const auto* first_pixel = static_cast<const float*>(noise.data_ptr());
  Images result{.classes = {first_class, first_class + images},
                .pixels = {first_pixel, first_pixel + images * config.tokens()}};
  for (const std::int64_t label : result.classes) {
    if (label < 0 || label >= config.classes) {
      throw ditattn::FileError(fmt::format("Noise file '{}' asks for class {}; classes are 0 to {}.", file.string(),
                                           label, config.classes - 1));
    }
  }
  if (!std::ranges::all_of(result.pixels, [](float pixel) { return std::isfinite(pixel); })) {
    throw ditattn::FileError(fmt::format("Noise file '{}' holds NaN or infinite noise.", file.string()));
  }
  return result;
}

Images sample(Model& model, const AttentionLayers& attention, const Images& noise, const SamplerOptions& options,
              const StepObserver& observe) {
  Images samples = noise;
  const std::int64_t tokens = model.config().tokens();
  const auto count = static_cast<std::int64_t>(samples.classes.size());
  for (std::int64_t first = 0; first < count; first += kBatch) {
    const std::int64_t images = std::min(kBatch, count - first);
    const std::span<float> x(samples.pixels.data() + first * tokens, images * tokens);
    const std::span<const std::int64_t> classes(samples.classes.data() + first, images);
    for (std::int64_t s = 0; s < options.steps; ++s) {
      const auto t = static_cast<float>(1 - static_cast<double>(s) / static_cast<double>(options.steps));
      step(model, attention, x, classes, t, options, observe(s, first));
    }
  }
  if (!std::ranges::all_of(samples.pixels, [](float pixel) { return std::isfinite(pixel); })) {
    throw ditattn::ValueError(
        fmt::format("Sampling did not stay finite with steps={} and guidance={}: the weights hold NaN or Inf, or the "
                    "guidance is too strong.",
                    options.steps, options.guidance));
  }
  for (float& pixel : samples.pixels) pixel = std::clamp(kMaxPixel / 2 * (pixel + 1), 0.0F, kMaxPixel);
  return samples;
}

void save_samples(const std::filesystem::path& file, const ModelConfig& config, const Images& samples,
                  const Images& noise, const SamplerOptions& options) {
  ditattn::Tensor labels = ditattn::empty({static_cast<std::int64_t>(samples.classes.size())}, ditattn::kInt64);
  std::ranges::copy(samples.classes, static_cast<std::int64_t*>(labels.data_ptr()));
  ditattn::save_safetensors(file, {.tensors = {{"samples", image_tensor(samples, config)},
                                               {"labels", labels},
                                               {"noise", image_tensor(noise, config)}},
                                   .metadata = {{"sample_steps", fmt::to_string(options.steps)},
                                                {"guidance", fmt::to_string(options.guidance)}}});
}

}  // namespace digits
