#pragma once

/// The catalogue: which attention problems real models ask, as data (models.json, embedded in the library).
/// docs/models.md explains its fields and how to add a model.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ditattn/problem.hpp"

namespace ditattn {

/// Where a role joins the text tokens to its own ones, as `AttentionMetadata`'s joint_strategy spells it.
enum class JointStrategy { none, front, rear };
/// "none", "front" or "rear".
const char* joint_strategy_name(JointStrategy strategy);

/// One attention problem of a model at one resolution: query (batch, seq_q, num_heads, head_size), key and value
/// (batch, seq_kv, num_kv_heads, head_size).
struct ModelRole {
  std::string role;        ///< as the selector's `per_role` names it: "self", "cross", "ltx2.audio_to_video"
  std::string category;    ///< "self" or "cross": what the selector falls back to
  std::string resolution;  ///< name of the model's resolution
  std::int64_t layers = 0;
  std::int64_t batch = 0;  ///< for one sample; 2 where the pipeline batches classifier-free guidance
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_size = 0;
  std::int64_t seq_q = 0;   ///< with the joint tokens
  std::int64_t seq_kv = 0;  ///< with the joint tokens
  JointStrategy joint = JointStrategy::none;
  std::int64_t joint_tokens = 0;  ///< how many of seq_q and seq_kv are joined text; 0 without
  MaskKind mask = MaskKind::none;
  std::string mask_note;  ///< how the reference code passes the mask, where that needs saying; else empty
};

/// A size that a model generates at.
struct ModelResolution {
  std::string name;  ///< "1024x1024", "480p"
  std::int64_t width = 0;
  std::int64_t height = 0;
  std::int64_t frames = 0;  ///< 1 for images
};

/// A model and everything it asks of attention.
struct Model {
  std::string name;
  std::string family;
  std::int64_t hidden_size = 0;
  std::string guidance;       ///< "none", "embedded" (one forward), "separate" (two of batch 1) or "batched" (batch 2)
  std::string layout;         ///< how the reference code lays out what it hands to attention: "BSHD" or "BHSD"
  bool text_at_most = false;  ///< text is not padded: its length is an upper bound
  std::vector<ModelResolution> resolutions;
  std::vector<ModelRole> roles;  ///< every role of the first resolution, then of the next
  std::string arithmetic;        ///< from pixels and frames to tokens
  std::vector<std::string> source;
  bool verified = false;
  std::string unverified;  ///< what could not be verified, and why; empty exactly when `verified`
  std::string notes;       ///< may be empty
};

/// All models of the catalogue, in its order. Parsed by the first call; thread-safe.
const std::vector<Model>& models();

/// The model of that name, in any case. ValueError that lists the names for an unknown one.
const Model& find_model(std::string_view name);

/// What a short name of the catalogue ("wan14b-720p") stands for, as `NAME@RESOLUTION:ROLE`; of others, `name` itself.
std::string full_name(std::string_view name);

/// A role as a problem for `AttentionBackend::explain`.
Problem to_problem(const ModelRole& role, DLDataType dtype, DLDevice device);

/// Parses a catalogue. ValueError that names the model and the field for anything missing, unknown or of a wrong
/// value. Lengths are taken as they stand; that they follow from the ingredients is checked by the tests.
std::vector<Model> parse_models(std::string_view json);

/// The embedded models.json.
std::string_view models_json();

}  // namespace ditattn
