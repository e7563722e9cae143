#pragma once

/// How long one attention would take over several GPUs, and what memory: predicted from measured figures, without a
/// GPU. docs/planning.md has the model.
///
///     using namespace ditattn::planner;
///     const Plan plan = make_plan({.problem = problem, .gpus = 8, .link = "nvlink"}, figures());
///     plan.meshes.front().mesh;  // the best

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/parallel.hpp"
#include "ditattn/problem.hpp"

namespace ditattn::planner {

/// Rows of a kernel's tile, and what one of its rows costs relative to the best tile's.
struct Tile {
  std::int64_t rows;  ///< of the query
  double cost;        ///< 1 for the best tile
};

/// A back end's kernel, 16-bit numbers. A tile of `rows` rows takes rows · cost · 4 · (keys + extra_keys) · head_size
/// operations of one multiprocessor; a GPU does as many tiles at a time as it has those.
struct KernelFigures {
  std::string backend;                            ///< a member's name
  std::vector<std::pair<double, double>> tflops;  ///< by head size, ascending; between them interpolated
  double extra_keys;                              ///< a tile's beginning and end, as keys
  double call_us;                                 ///< of every call
  std::vector<Tile> tiles;                        ///< the best for a problem is taken
  std::string source;                             ///< where that was measured
};

/// A kind of GPU.
struct GpuFigures {
  std::string name;                    ///< "H200"
  int units;                           ///< multiprocessors
  double copy_gb_per_s;                ///< bytes read and written, 10⁹ a second
  double copy_us;                      ///< of every kernel that copies or merges
  std::string source;                  ///< where that was measured
  std::vector<KernelFigures> kernels;  ///< one per back end
};

/// What joins GPUs.
struct LinkFigures {
  std::string name;    ///< "nvlink"
  double gb_per_s;     ///< of one GPU, in each direction at once
  double latency_us;   ///< of a batch of sends and receives started together
  double hidden;       ///< of a transfer and what is computed beside it, what of the shorter is hidden
  bool copy_engines;   ///< tokens are carried as they lie, and Ulysses alone goes in parts
  std::string source;  ///< where that was measured
};

/// All that predictions rest on.
struct Figures {
  int gpus_per_node;               ///< of which `node_link` joins each with each
  std::string node_link;           ///< the link inside a node
  std::vector<GpuFigures> gpus;    ///< by name
  std::vector<LinkFigures> links;  ///< by name
};

/// The embedded ones (src/planner/figures.json). Parsed by the first call; thread-safe.
DITATTN_API const Figures& figures();
/// The text that `figures` was parsed from.
DITATTN_API std::string_view figures_json();
/// ValueError that names the place for what is missing, unknown or of a wrong value.
DITATTN_API Figures parse_figures(std::string_view json);

/// What is asked. ValueErrors of `make_plan` say what is allowed.
struct Request {
  Problem problem = {};           ///< seq_q and seq_kv with the text; of dtype the size counts; masks are not looked at
  std::int64_t joint_tokens = 0;  ///< how many of seq_q and of seq_kv are joint text
  bool joint_first = true;        ///< text before the image
  int gpus = 1;                   ///< 1 to 1,024
  std::string link = "nvlink";    ///< the node's own, or what joins nodes
  std::optional<int> gpus_per_node =
      {};                              ///< none: the figures', but 1 where another link joins GPUs that one node holds
  std::string gpu = "H200";            ///< of the figures
  std::string backend = "FLASH_ATTN";  ///< a member of which the GPU has figures
};

/// One mesh. Milliseconds are those of the slowest rank in each phase: what they come to is `ms`.
struct MeshPlan {
  parallel::Mesh mesh;                  ///< its degrees
  double ms = 0;                        ///< of one attention: attention, copying and exchange
  double attention_ms = 0;              ///< the back end's calls
  double copying_ms = 0;                ///< packing, merging, rounding
  double exchange_ms = 0;               ///< what of it nothing hides
  std::int64_t sent_bytes = 0;          ///< to other ranks, by the rank that sends most
  std::int64_t workspace_bytes = 0;     ///< kept by the group, on the rank that needs most
  std::int64_t tensor_bytes = 0;        ///< its query, key, value and output
  std::vector<std::string> notes = {};  ///< what is uneven
};

/// What is predicted.
struct Plan {
  double one_gpu_ms = 0;         ///< the back end's own call
  int gpus_per_node = 1;         ///< as taken
  std::vector<MeshPlan> meshes;  ///< every one of so many GPUs, the fastest first
};

/// Every mesh of so many GPUs. ValueError for a request that makes no sense, or that `figures` know nothing of.
DITATTN_API Plan make_plan(const Request& request, const Figures& figures);

/// Why the first mesh of a plan is the best, beside the next one: a sentence.
DITATTN_API std::string explain_best(const Plan& plan);

}  // namespace ditattn::planner
