#include "ditattn/backend.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

// Sizes above this are typing errors, not models.
constexpr std::int64_t kMaxHeads = 1 << 20;
constexpr std::int64_t kMaxHeadSize = 1 << 16;

void check_config(const std::string& backend, const ImplConfig& config) {
  const auto check_range = [&](const char* what, std::int64_t value, std::int64_t max) {
    if (value < 1 || value > max)
      throw ValueError(fmt::format("{}: {}={} is not from 1 to {}.", backend, what, value, max));
  };
  check_range("num_heads", config.num_heads, kMaxHeads);
  check_range("head_size", config.head_size, kMaxHeadSize);
  const std::int64_t kv_heads = config.num_kv_heads.value_or(config.num_heads);
  check_range("num_kv_heads", kv_heads, kMaxHeads);
  if (config.num_heads % kv_heads != 0) {
    throw ValueError(
        fmt::format("GQA requires query heads to be a multiple of KV heads, got q_heads={} and kv_heads={}.",
                    config.num_heads, kv_heads));
  }
  if (config.softmax_scale && !std::isfinite(*config.softmax_scale)) {
    throw ValueError(fmt::format("{}: softmax_scale={} is not finite.", backend, *config.softmax_scale));
  }
}

// One warning names all options the backend does not know.
void warn_unknown_kwargs(const std::string& backend, const ImplConfig& config, const std::vector<std::string>& known) {
  if (std::ranges::find(known, "*") != known.end()) return;
  std::vector<std::string> unknown;
  for (const auto& [key, value] : config.backend_kwargs) {
    if (std::ranges::find(known, std::string(key)) == known.end()) unknown.push_back("'" + std::string(key) + "'");
  }
  if (unknown.empty()) return;
  std::ranges::sort(unknown);
  log(LogLevel::warning, fmt::format("{} ignoring backend_kwargs: [{}]", backend, fmt::join(unknown, ", ")));
}

}  // namespace

AttentionBackend::~AttentionBackend() = default;

Verdict AttentionBackend::explain(const Problem& problem) const {
  return check_capabilities(get_name(), capabilities(), problem);
}

std::unique_ptr<AttentionImpl> AttentionBackend::make(const ImplConfig& config) const {
  check_config(get_name(), config);
  warn_unknown_kwargs(get_name(), config, known_kwargs());
  return BackendAccess::create(shared_from_this(), config);
}

ImplFactory AttentionBackend::get_impl_cls() const {
  return [self = shared_from_this()](const ImplConfig& config) { return self->make(config); };
}

std::vector<std::int64_t> AttentionBackend::get_supported_head_sizes() const {
  const HeadSizes& sizes = capabilities().head_sizes;
  if (!sizes.list.empty() || sizes.max == 0) return sizes.list;
  std::vector<std::int64_t> result;
  const std::int64_t largest = std::min(sizes.max, kMaxHeadSize);  // plug-ins say anything
  for (std::int64_t size = std::max<std::int64_t>(sizes.min, 1); size <= largest; ++size) {
    if (sizes.contains(size)) result.push_back(size);
  }
  return result;
}

bool AttentionBackend::supports_head_size(std::int64_t head_size) const {
  return capabilities().head_sizes.contains(head_size);
}

bool AttentionBackend::supports_attention_mask() const {
  const Capabilities& can = capabilities();
  return can.has_mask("padding") || can.has_mask("bool") || can.has_mask("additive");
}

bool AttentionBackend::supports_piecewise_spans() const { return capabilities().has_mask("spans"); }

}  // namespace ditattn
