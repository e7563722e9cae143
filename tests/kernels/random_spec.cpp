#include "tests/kernels/draw.hpp"
#include "tests/kernels/test_problem.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

// Small counts and the neighbours of block sizes alike.
std::int64_t count(Random& random) {
  if (chance(random, 0.2)) return pick<std::int64_t>(random, {1, 63, 64, 65, 127, 128, 129, 255, 256, 257});
  return chance(random, 0.7) ? whole(random, 1, 40) : whole(random, 41, 400);
}

std::int64_t head_size(Random& random) {
  if (chance(random, 0.4)) return pick<std::int64_t>(random, {16, 32, 40, 64, 72, 80, 96, 128, 256});
  return whole(random, 1, 256);
}

// One or two segments; either of two may be empty.
std::vector<std::int64_t> segments(Random& random) {
  if (chance(random, 0.5)) return {count(random)};
  std::vector<std::int64_t> parts{count(random), count(random)};
  if (chance(random, 0.1)) parts[static_cast<std::size_t>(whole(random, 0, 1))] = 0;
  return parts;
}

MaskSpec random_mask(Random& random) {
  return {.present = true,
          .type = chance(random, 0.4)
                      ? ElementType::boolean
                      : pick(random, {ElementType::float32, ElementType::float16, ElementType::bfloat16}),
          .per_batch = chance(random, 0.5),
          .per_head = chance(random, 0.5),
          .per_row = chance(random, 0.7),
          .key_stride = chance(random, 0.7) ? 1 : whole(random, 2, 3),
          .some_rows = chance(random, 0.3),
          .hidden_fraction = pick(random, {0.0, 0.1, 0.5, 0.97, 1.0})};
}

std::int64_t total(const std::vector<std::int64_t>& parts) { return parts.front() + (parts.size() > 1 ? parts[1] : 0); }

std::int64_t work_of(const Spec& spec) {
  return spec.batch * spec.kv_heads * spec.group * total(spec.rows) * total(spec.keys) * spec.head_size;
}

}  // namespace

Spec random_spec(Random& random, std::int64_t work) {
  Spec spec;
  spec.type = pick(random, {ElementType::float32, ElementType::float16, ElementType::bfloat16});
  spec.rows = segments(random);
  spec.keys = segments(random);
  spec.head_size = head_size(random);
  spec.batch = whole(random, 1, 3);
  spec.kv_heads = whole(random, 1, 3);
  spec.group = chance(random, 0.5) ? 1 : whole(random, 2, 5);
  spec.scale = pick(random, {1.0, 1.0, 0.5, 2.0, 0.0, -1.0});
  for (std::size_t i = 0; i < spec.keys.size(); ++i) {
    if (chance(random, 0.4)) spec.masks[i] = random_mask(random);
  }
  spec.lengths = chance(random, 0.3);
  spec.ranges = chance(random, 0.3);
  spec.causal = !spec.ranges && chance(random, 0.3);  // ranges have the diagonal in them
  spec.causal_offset = whole(random, -total(spec.rows), total(spec.keys));
  spec.lse = chance(random, 0.7);
  spec.heads_first = chance(random, 0.5);
  spec.gap = chance(random, 0.5) ? 0 : whole(random, 1, 5);
  spec.specials_seen = chance(random, 0.2);
  spec.threads = static_cast<int>(whole(random, 1, 3));
  while (work_of(spec) > work) {
    std::int64_t& largest = spec.batch > 1 ? spec.batch : spec.kv_heads > 1 ? spec.kv_heads : spec.group;
    if (largest > 1) {
      --largest;
      continue;
    }
    for (std::int64_t& part : total(spec.rows) > total(spec.keys) ? spec.rows : spec.keys) part = part * 2 / 3;
  }
  return spec;
}

}  // namespace ditattn::kernels::cpu::testing
