#include "tools/ditattn/backend_info.hpp"

#include <algorithm>

#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/table.hpp"

namespace ditattn::cli {
namespace {

constexpr std::size_t kReasonWidth = 72;

Json head_sizes_json(const HeadSizes& sizes) {
  if (sizes.any()) return nullptr;
  if (!sizes.list.empty()) return sizes.list;
  return {{"min", sizes.min}, {"max", sizes.max == 0 ? Json(nullptr) : Json(sizes.max)}, {"multiple", sizes.multiple}};
}

}  // namespace

BackendInfo inspect(DiffusionAttentionBackendEnum member) {
  BackendInfo info{
      .member = member, .class_path = member.value(), .backend = nullptr, .available = false, .reason = {}};
  try {
    info.class_path = member.get_path();
    info.backend = member.get_class();
    info.backend->validate_available();
    info.available = true;
  } catch (...) {
    info.reason = current_failure().message;
  }
  return info;
}

Json to_json(const BackendInfo& info) {
  const Capabilities can = info.backend ? info.backend->capabilities() : Capabilities{};
  Json dtypes = Json::array();
  for (const DLDataType dtype : can.dtypes) dtypes.push_back(dtype_name(dtype));
  return {{"name", info.member.name()},
          {"class_path", info.class_path},
          {"default_path", info.member.value()},
          {"overridden", info.member.is_overridden()},
          {"available", info.available},
          {"reason", info.available ? Json(nullptr) : Json(info.reason)},
          {"engine", info.backend ? Json(can.engine) : Json(nullptr)},
          {"devices", can.devices},
          {"dtypes", dtypes},
          {"head_sizes", head_sizes_json(can.head_sizes)},
          {"masks", can.masks},
          {"gqa", can.gqa},
          {"causal", can.causal},
          {"lse", can.lse}};
}

std::string short_reason(const std::string& reason) {
  std::string text = reason.substr(0, reason.find('\n'));
  if (text.starts_with("Cannot import '")) {
    const std::size_t colon = text.find("': ");
    if (colon != std::string::npos) text.erase(0, colon + 3);
  }
  text.resize(std::min(text.size(), text.find(". ")));
  return shorten(text, kReasonWidth);
}

}  // namespace ditattn::cli
