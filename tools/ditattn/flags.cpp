#include "tools/ditattn/flags.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "core/text.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/threads.hpp"
#include "tools/ditattn/exit_status.hpp"

namespace ditattn::cli {
namespace {

std::vector<std::string> split_at_commas(const std::string& text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace

DiffusionAttentionBackendEnum parse_member(const std::string& name) {
  return DiffusionAttentionBackendEnum::from_name(upper_case(name));
}

std::vector<DiffusionAttentionBackendEnum> parse_members(const std::string& names) {
  std::vector<DiffusionAttentionBackendEnum> members;
  for (const std::string& name : split_at_commas(names)) {
    if (name.empty()) throw UsageError(fmt::format("--backends '{}' has an empty name. Expected A,B,…", names));
    const DiffusionAttentionBackendEnum member = parse_member(name);
    if (std::ranges::find(members, member) == members.end()) members.push_back(member);
  }
  return members;
}

DLDataType parse_float_dtype(const std::string& name) {
  for (const DLDataType dtype : {kFloat32, kFloat16, kBFloat16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  if (name == "f32" || name == "f16" || name == "bf16") return parse_dtype(name);
  throw UsageError(fmt::format("--dtype '{}' is not one of float32, float16, bfloat16 (f32, f16, bf16).", name));
}

std::vector<std::int64_t> parse_shape(const std::string& text) {
  std::vector<std::int64_t> sizes;
  for (const std::string& part : split_at_commas(text)) {
    std::int64_t size = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), size);
    if (error != std::errc() || end != part.data() + part.size() || size < 1 ||
        size > std::numeric_limits<std::int32_t>::max()) {
      throw UsageError(
          fmt::format("--shape '{}': '{}' is not a whole number from 1 to 2147483647. Expected B,H,Sq,Skv,D, for "
                      "example 1,24,4096,4096,128.",
                      text, part));
    }
    sizes.push_back(size);
  }
  if (sizes.size() != 5) {
    throw UsageError(fmt::format("--shape '{}' has {} sizes, expected 5: B,H,Sq,Skv,D, for example 1,24,4096,4096,128.",
                                 text, sizes.size()));
  }
  return sizes;
}

DLDevice parse_device(const std::string& device) {
  if (device == "cpu") return kCpu;
  if (device == "cuda") {
    if (!cuda_info().devices.empty()) return {kDLCUDA, 0};
    throw ImportError(fmt::format("Device 'cuda' is unavailable: {}. Use --device cpu.", cuda_info().reason));
  }
  throw UsageError(fmt::format("Unknown device '{}'. Valid devices are: cpu, cuda", device));
}

void check_thread_count() {
  try {
    num_threads();
  } catch (const ValueError& error) {
    throw UsageError(error.message());
  }
}

void register_backends(const std::vector<std::string>& registrations) {
  for (const std::string& entry : registrations) {
    const std::size_t equals = entry.find('=');
    if (equals == 0 || equals == std::string::npos || equals + 1 == entry.size()) {
      throw UsageError(fmt::format(
          "--register '{}' is not NAME=package.module.Class, for example CUSTOM=acme.attention.FastBackend.", entry));
    }
    const std::string name = upper_case(entry.substr(0, equals));
    const auto members = DiffusionAttentionBackendEnum::members();
    const auto known = std::ranges::find(members, name, [](const auto& member) { return member.name(); });
    const auto member = known != members.end() ? *known : DiffusionAttentionBackendEnum::define(name);
    register_diffusion_backend(member, entry.substr(equals + 1));
  }
}

void add_json_flag(CLI::App& verb, bool& json) { verb.add_flag("--json", json, "Print one JSON document instead"); }

void add_call_flags(CLI::App& verb, CallOptions& options) {
  verb.add_option("--joint-strategy", options.joint_strategy,
                  "Text tokens stand in front or at the rear (default: as the file says, or else front)")
      ->check(CLI::IsMember({"front", "rear"}));
  verb.add_option("--valid-kv-length", options.valid_kv_length,
                  "Only the first N keys of a file's tensors exist (default: as the file says)");
}

CLI::Validator number_from(double lowest) {
  const auto check = [lowest](const std::string& text) {
    double number = 0;
    if (!CLI::detail::lexical_cast(text, number) || !std::isfinite(number)) {
      return fmt::format("'{}' is not a finite number", text);
    }
    return number < lowest ? fmt::format("{} is below {}", text, lowest) : std::string();
  };
  return {check, ""};
}

}  // namespace ditattn::cli
