#pragma once

/// A conformance case: one line `field=value field=value …` of a case file. README.md says how they are used.

#include <ditattn/tensor.hpp>

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace ditattn::conformance {

enum class MaskCase {
  none,            ///< no mask
  prefix,          ///< (B, Skv) bool: a random number of keys, 0 included
  padding,         ///< (B, Skv) bool with holes
  all_true,        ///< (B, Skv) bool that hides nothing
  bool_qk,         ///< (1, 1, Sq, Skv)
  bool_bhqk,       ///< (B, H, Sq, Skv)
  bool_head,       ///< (H, Sq, Skv): three dimensions
  bool_head_keys,  ///< (1, H, 1, Skv): another padding for every head
  bool_batch,      ///< (B, 1, 1, 1): all keys of a batch entry or none
  additive,        ///< (1, 1, Sq, Skv) in the query's dtype: finite numbers, −1e9 among them
  additive_head,   ///< (B, H, Sq, Skv) float32 with −∞
  additive_keys,   ///< (B, 1, 1, Skv) in the query's dtype: 0 and −∞
  empty_rows,      ///< (B, 1, Sq, Skv) bool where many rows have no key
};
enum class NanCase {
  none,
  hidden,     ///< NaN and ±Inf in K and V where no row looks
  some_rows,  ///< also in one key that some rows see and others do not
};
enum class Layout {
  contiguous,  ///< (B, S, H, D)
  bhsd,        ///< (B, H, S, D) in memory
  packed,      ///< slices of one (B, S, H + 2·Hkv, D) tensor where Sq = Skv, else of (B, Skv, 2·Hkv, D)
  padded,      ///< three elements between rows
  expanded,    ///< one batch entry, batch stride 0
  reversed,    ///< tokens in reverse order, by a negative stride; the mask's keys two apart
};
enum class Input {
  normal,   ///< N(0, 1)
  outlier,  ///< one channel of Q and K 20 times larger
  offset,   ///< K and V plus a constant 8
  huge,     ///< 30 times N(0, 1)
  tiny,     ///< N(0, 1) / 1000
};

struct Case {
  std::int64_t batch = 2;
  std::int64_t heads = 2;
  std::int64_t kv_heads = 2;
  std::int64_t seq_q = 64;
  std::int64_t seq_kv = 64;
  std::int64_t head_size = 64;
  DLDataType dtype = kFloat32;
  MaskCase mask = MaskCase::none;
  NanCase nan = NanCase::none;
  bool causal = false;
  std::optional<double> scale;  ///< none: 1/√D
  Layout layout = Layout::contiguous;
  bool out_given = false;
  bool lse = true;
  Input input = Input::normal;
  std::string line;  ///< as written: names the case

  [[nodiscard]] double softmax_scale() const;
};

/// Throws std::runtime_error that names the field and what it may be.
Case parse_case(const std::string& line);

/// Cases of `cases/<name>.txt`; errors name file and line.
std::vector<Case> load_cases(const std::string& name);

/// cases/space.txt.
struct Space {
  struct Field {
    std::string name;
    std::vector<std::string> values;
    bool in_full_product;
  };
  std::vector<Field> fields;
};
Space load_space();

/// "D=64 Sq=1 …" as field → value, in the file's spelling.
std::map<std::string, std::string> split_fields(const std::string& line);

}  // namespace ditattn::conformance
