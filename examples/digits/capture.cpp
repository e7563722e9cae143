#include "capture.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace digits {
namespace {

constexpr double kLevels[] = {0.95, 0.65, 0.35, 0.05};

// Copies image 0 of a call, the first of the batch with its class, to a block's place in the case's tensor.
void copy_first_image(const ditattn::Tensor& from, std::int64_t block, const ditattn::Tensor& to) {
  const auto* source = static_cast<const float*>(ditattn::data_pointer(from));
  const std::int64_t row = from.size(2) * from.size(3);
  auto* target = static_cast<float*>(to.data_ptr()) + block * from.size(1) * row;
  for (std::int64_t token = 0; token < from.size(1); ++token) {
    std::copy_n(source + token * from.stride(1), row, target + token * row);
  }
}

}  // namespace

Capture::Capture(const ModelConfig& config, const SamplerOptions& options) : config_(config), steps_(options.steps) {
  const auto steps = static_cast<double>(steps_);
  for (const double level : kLevels) {
    const std::int64_t step = std::clamp<std::int64_t>(std::llround((1 - level) * steps), 0, steps_ - 1);
    cases_[step] = fmt::format("digits t={:.2f}", 1 - static_cast<double>(step) / steps);
  }
}

AttentionObserver Capture::at(std::int64_t step, std::int64_t first_image) {
  const auto wanted = cases_.find(step);
  if (first_image != 0 || wanted == cases_.end()) return {};
  return [this, name = wanted->second](std::int64_t block, const ditattn::Tensor& query, const ditattn::Tensor& key,
                                       const ditattn::Tensor& value) {
    for (const auto& [part, tensor] :
         {std::pair(".query", query), std::pair(".key", key), std::pair(".value", value)}) {
      auto& kept = content_.tensors[name + part];
      if (!kept.defined()) {
        kept =
            ditattn::empty({config_.blocks, config_.tokens(), config_.heads, config_.head_size()}, ditattn::kFloat32);
      }
      copy_first_image(tensor, block, kept);
    }
  };
}

void Capture::save(const std::filesystem::path& file, const std::string& made_by) const {
  ditattn::SafetensorsFile content = content_;
  content.metadata = {
      {"description",
       fmt::format("Query, key and value of self attention in a trained diffusion transformer that draws 8x8 digits "
                   "(the digits example of ditattn): {} blocks, {} heads of {}, {} tokens, no mask, scale 1/sqrt({}).",
                   config_.blocks, config_.heads, config_.head_size(), config_.tokens(), config_.head_size())},
      {"layout",
       "One case per noise level t (1 is noise, 0 the image): <case>.query, <case>.key and <case>.value, shape "
       "(block, token, head, channel), the blocks of the model in the batch dimension; the first image of the batch, "
       "conditioned on its class."},
      {"made_by", made_by}};
  ditattn::save_safetensors(file, content);
}

}  // namespace digits
