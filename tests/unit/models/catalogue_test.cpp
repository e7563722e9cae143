// The catalogue of models: that its data is complete and follows from its ingredients, and that the reader refuses
// what is wrong. The lengths are worked out again here from the JSON itself, with nothing of the reader's.

#include "models/catalogue.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <functional>
#include <map>
#include <regex>
#include <set>
#include <thread>

#include "ditattn/errors.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using nlohmann::json;
using testing::error_text;
using testing::expect_contains;

// A reference: a loop over a part of a temporary would run over freed memory.
const json& catalogue() {
  static const json document = json::parse(models_json());
  return document;
}

// Tokens of each stream of a model at a resolution: "latent" (image or video), "audio", and each context.
std::map<std::string, std::int64_t> tokens(const json& model, const json& resolution) {
  std::map<std::string, std::int64_t> result;
  const auto exact = [&](std::int64_t length, std::int64_t step) {
    EXPECT_EQ(length % step, 0) << model["name"] << " " << resolution["name"] << ": " << length << " / " << step;
    return length / step;
  };
  const json& patch = model["patch"];
  const std::int64_t spatial = model["vae_spatial"];
  const std::int64_t latent_frames =
      exact(resolution["frames"].get<std::int64_t>() - 1, model["vae_temporal"].get<std::int64_t>()) + 1;
  result["latent"] = exact(latent_frames, patch[0]) *
                     exact(exact(resolution["height"].get<std::int64_t>(), spatial), patch[1]) *
                     exact(exact(resolution["width"].get<std::int64_t>(), spatial), patch[2]);
  for (const auto& [name, parts] : model["context"].items()) {
    for (const json& part : parts) result[name] += part.get<std::int64_t>();
  }
  if (model.contains("audio_latents_per_second")) {
    const double seconds = resolution["frames"].get<double>() / resolution["fps"].get<double>();
    result["audio"] = std::llround(seconds * model["audio_latents_per_second"].get<double>());
  }
  return result;
}

const ModelRole& role_of(const Model& model, const std::string& resolution, const std::string& role) {
  for (const ModelRole& candidate : model.roles) {
    if (candidate.resolution == resolution && candidate.role == role) return candidate;
  }
  throw ValueError(fmt::format("{} has no role {} at {}", model.name, role, resolution));
}

std::string shape(const ModelRole& role) {
  return fmt::format("{},{},{},{},{} {} {}", role.batch, role.num_heads, role.seq_q, role.seq_kv, role.head_size,
                     mask_kind_name(role.mask), joint_strategy_name(role.joint));
}

TEST(Catalogue, HasEveryModelThatIsPromised) {
  for (const char* name :
       {"FLUX.1-dev",      "FLUX.1-schnell", "FLUX.2-dev",      "FLUX.2-klein-4B", "SD3-medium",    "SD3.5-medium",
        "SD3.5-large",     "PixArt-alpha",   "PixArt-Sigma",    "Z-Image",         "Z-Image-Turbo", "Qwen-Image",
        "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B",  "HunyuanVideo",  "HunyuanVideo-1.5",
        "LTX-Video-2B",    "LTX-Video-13B",  "LTX-2",           "CogVideoX-2B",    "CogVideoX-5B",  "Mochi-1",
        "DiT-XL/2",        "SiT-XL/2"}) {
    EXPECT_NO_THROW(static_cast<void>(find_model(name))) << name;
  }
  for (const char* name : {"Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-T2V-A14B"}) {
    for (const char* resolution : {"480p", "720p"}) {
      EXPECT_NO_THROW(static_cast<void>(role_of(find_model(name), resolution, "self"))) << name << " " << resolution;
      EXPECT_NO_THROW(static_cast<void>(role_of(find_model(name), resolution, "cross"))) << name << " " << resolution;
    }
  }
}

TEST(Catalogue, LengthsFollowFromPixelsAndFrames) {
  std::size_t compared = 0;
  for (const json& model : catalogue()["models"]) {
    for (const json& resolution : model["resolutions"]) {
      const auto streams = tokens(model, resolution);
      for (const json& role : model["roles"]) {
        const std::int64_t joint = role["joint"] == "none" ? 0 : streams.at("text");
        const json expected = {streams.at(role["query"]) + joint, streams.at(role["key"]) + joint};
        EXPECT_EQ(resolution["lengths"][role["role"].get<std::string>()], expected)
            << model["name"] << " " << resolution["name"] << " " << role["role"];
        ++compared;
      }
    }
  }
  std::size_t roles = 0;
  for (const Model& model : models()) roles += model.roles.size();
  EXPECT_EQ(compared, roles);
}

TEST(Catalogue, HeadsTimesHeadSizeIsTheHiddenSize) {
  for (const json& model : catalogue()["models"]) {
    for (const json& role : model["roles"]) {
      const std::int64_t hidden = role.value("hidden_size", model["hidden_size"].get<std::int64_t>());
      EXPECT_EQ(role["heads"].get<std::int64_t>() * role["head_size"].get<std::int64_t>(), hidden)
          << model["name"] << " " << role["role"];
    }
  }
}

TEST(Catalogue, BatchFollowsFromGuidance) {
  for (const Model& model : models()) {
    for (const ModelRole& role : model.roles) {
      EXPECT_EQ(role.batch, model.guidance == "batched" ? 2 : 1) << model.name << " " << role.role;
    }
  }
}

TEST(Catalogue, EveryRoleIsAProblemTheSelectorCanName) {
  const std::regex name("self|cross|[a-z0-9_]+(\\.[a-z0-9_]+)+");
  for (const Model& model : models()) {
    std::set<std::string> resolutions;
    for (const ModelResolution& resolution : model.resolutions) resolutions.insert(resolution.name);
    EXPECT_EQ(resolutions.size(), model.resolutions.size()) << model.name << ": resolutions share a name";
    std::set<std::pair<std::string, std::string>> seen;
    for (const ModelRole& role : model.roles) {
      EXPECT_TRUE(std::regex_match(role.role, name)) << model.name << " " << role.role;
      EXPECT_TRUE(seen.insert({role.resolution, role.role}).second) << model.name << " " << role.role << " twice";
      // A role that joins text joins less of it than there is in all.
      EXPECT_LT(role.joint_tokens, std::min(role.seq_q, role.seq_kv)) << model.name << " " << role.role;
      EXPECT_EQ(role.joint != JointStrategy::none, role.joint_tokens > 0) << model.name << " " << role.role;
    }
    EXPECT_EQ(seen.size() % resolutions.size(), 0U) << model.name;
  }
}

// Sources name a repository's file or say which published text; what is not verified says why.
TEST(Catalogue, FiguresHaveSources) {
  for (const Model& model : models()) {
    EXPECT_FALSE(model.source.empty()) << model.name;
    for (const std::string& source : model.source) EXPECT_GT(source.size(), 20U) << model.name << ": " << source;
    EXPECT_NE(model.arithmetic.find('='), std::string::npos) << model.name;
    EXPECT_TRUE(model.verified || model.unverified.size() > 20U) << model.name;
  }
}

// Worked out by hand from the papers and repositories, independently of the file.
TEST(Catalogue, KnownFigures) {
  const auto at = [](const char* model, const char* resolution, const char* role) {
    return shape(role_of(find_model(model), resolution, role));
  };
  EXPECT_EQ(at("FLUX.1-dev", "1024x1024", "self"), "1,24,4608,4608,128 none front");
  EXPECT_EQ(at("DiT-XL/2", "256x256", "self"), "2,16,256,256,72 none none");
  EXPECT_EQ(at("Wan2.1-T2V-14B", "720p", "self"), "1,40,75600,75600,128 none none");
  EXPECT_EQ(at("Wan2.1-T2V-14B", "480p", "cross"), "1,40,32760,512,128 none none");
  EXPECT_EQ(at("SD3-medium", "1024x1024", "self"), "2,24,4429,4429,64 none rear");
  EXPECT_EQ(at("CogVideoX-5B", "720x480x49", "self"), "2,48,17776,17776,64 none front");
  EXPECT_EQ(at("HunyuanVideo", "720p", "self"), "1,24,119056,119056,128 padding rear");
  EXPECT_EQ(at("PixArt-Sigma", "1024x1024", "cross"), "2,16,4096,300,72 padding none");
  EXPECT_EQ(at("Mochi-1", "848x480x163", "self"), "2,24,44776,44776,128 padding rear");
  EXPECT_EQ(at("LTX-2", "768x512x121", "ltx2.audio_to_video"), "2,32,6144,126,64 none none");
}

TEST(Catalogue, NamesAreFoundInAnyCase) {
  EXPECT_EQ(&find_model("flux.1-DEV"), &find_model("FLUX.1-dev"));
  const std::string text = error_text<ValueError>([] { static_cast<void>(find_model("FLUX.3")); });
  expect_contains(text, {"Unknown model: 'FLUX.3'. Valid models are: FLUX.1-dev, FLUX.1-schnell, ", "Mochi-1"});
}

// CTest runs each test in a process of its own, so this is the first use.
TEST(Catalogue, FirstUseByManyThreads) {
  std::vector<const std::vector<Model>*> seen(16);
  std::vector<std::thread> threads;
  for (auto& slot : seen) threads.emplace_back([&slot] { slot = &models(); });
  for (std::thread& thread : threads) thread.join();
  for (const auto* all : seen) EXPECT_EQ(all, seen.front());
}

TEST(Catalogue, RoleBecomesAProblem) {
  const ModelRole& role = role_of(find_model("HunyuanVideo"), "540p", "hunyuan_video.token_refiner");
  const Problem problem = to_problem(role, kBFloat16, kCpu);
  EXPECT_EQ(problem.batch, 1);
  EXPECT_EQ(problem.num_heads, 24);
  EXPECT_EQ(problem.num_kv_heads, 24);
  EXPECT_EQ(problem.seq_q, 256);
  EXPECT_EQ(problem.seq_kv, 256);
  EXPECT_EQ(problem.head_size, 128);
  EXPECT_EQ(problem.mask, MaskKind::boolean);
  EXPECT_EQ(problem.dtype.bits, 16);
}

// One change to the first model makes the whole catalogue refused, with a message that says where and what.
TEST(Catalogue, RefusesWhatIsWrong) {
  struct Wrong {
    const char* what;
    std::function<void(json&)> change;
    std::vector<std::string> message;
  };
  const auto role = [](json& model) -> json& { return model["roles"][0]; };
  const auto resolution = [](json& model) -> json& { return model["resolutions"][0]; };
  const std::vector<Wrong> cases = {
      {"missing", [](json& m) { m.erase("family"); }, {"model 'FLUX.1-dev' lacks the field 'family'"}},
      {"misspelt", [&](json& m) { role(m)["head"] = 3; }, {"role 'self' has an unknown field 'head'", "heads"}},
      {"negative", [&](json& m) { role(m)["heads"] = -24; }, {"role 'self' has 'heads': -24", "above 0"}},
      {"a text for a number", [&](json& m) { role(m)["layers"] = "57"; }, {"'layers': \"57\""}},
      {"K/V heads", [&](json& m) { role(m)["kv_heads"] = 7; }, {"24 heads, not a multiple of its 7"}},
      {"mask", [&](json& m) { role(m)["mask"] = "causal"; }, {"'mask': \"causal\"", "none, padding, bool, additive"}},
      {"joint", [&](json& m) { role(m)["joint"] = "left"; }, {"'joint': \"left\"", "none, front, rear"}},
      {"joint without text", [](json& m) { m["context"] = json::object(); }, {"'context' has no 'text'"}},
      {"role is no object", [&](json& m) { role(m) = 3; }, {"role without a name is no object"}},
      {"no roles", [](json& m) { m["roles"] = json::array(); }, {"'roles': []", "a list with entries"}},
      {"lengths of no role",
       [&](json& m) {
         resolution(m)["lengths"] = {{"x", {1, 1}}};
       },
       {"for the role 'self'"}},
      {"one length", [&](json& m) { resolution(m)["lengths"]["self"] = {1}; }, {"no [Sq, Skv]"}},
      {"zero length",
       [&](json& m) {
         resolution(m)["lengths"]["self"] = {0, 1};
       },
       {"'self': 0"}},
      {"no source", [](json& m) { m["source"] = json::array(); }, {"'source': []"}},
      {"unverified without a reason", [](json& m) { m["verified"] = false; }, {"'unverified'"}},
      {"name twice", [](json& m) { m["name"] = "flux.1-SCHNELL"; }, {"two models named 'FLUX.1-schnell'"}},
  };
  for (const Wrong& wrong : cases) {
    SCOPED_TRACE(wrong.what);
    json changed = catalogue();
    wrong.change(changed["models"][0]);
    expect_contains(error_text<ValueError>([&] { static_cast<void>(parse_models(changed.dump())); }), wrong.message);
  }
  expect_contains(error_text<ValueError>([] { static_cast<void>(parse_models("{")); }), {"not JSON"});
  expect_contains(error_text<ValueError>([] { static_cast<void>(parse_models("[]")); }), {"the document is no object"});
}

}  // namespace
}  // namespace ditattn
