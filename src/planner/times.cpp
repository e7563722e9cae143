#include "planner/times.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ditattn::planner {
namespace {

constexpr std::int64_t kFloat = 4;

// TFLOP/s at a head size: between known ones on a line, beyond them the nearest.
double rate_at(const KernelFigures& kernel, double head_size) {
  const auto& known = kernel.tflops;
  const auto above = std::ranges::find_if(known, [&](const auto& entry) { return entry.first >= head_size; });
  if (above == known.end()) return known.back().second;
  if (above == known.begin()) return known.front().second;
  const auto below = above - 1;
  const double part = (head_size - below->first) / (above->first - below->first);
  return below->second + part * (above->second - below->second);
}

// Rows and keys of a call, in joined order.
struct Block {
  Range rows;
  Range keys;
};

Range text_range(const Work& work, std::int64_t image, Range share) {
  const std::int64_t begin = work.text_first ? 0 : image;
  return {begin + share.begin, begin + share.end};
}

Range image_range(const Work& work, Range chunk) {
  const std::int64_t begin = work.text_first ? work.text : 0;
  return {begin + chunk.begin, begin + chunk.end};
}

// What is read and written to merge part `part` of the results with those before it: the sums of one run of heads are
// float32 from the second merge to the last but one, those of several always.
std::int64_t merged_bytes(const Layout& layout, const HeadShare& mine, std::int64_t part, std::int64_t rows,
                          std::int64_t run) {
  const std::int64_t element = layout.work().element;
  if (mine.is_one_run() && part == 0) return 0;
  const bool is_last = part + 1 == layout.parts(rows);
  const std::int64_t before = mine.is_one_run() && part == 1 ? element : kFloat;
  const std::int64_t after = mine.is_one_run() && is_last ? element : kFloat;
  return layout.elements(rows, run) * (element + before + after);
}

// A rank's calls between its rows, the text's and the image's, and some keys, with what merging them takes.
Phase step_of(const Layout& layout, const Machine& machine, int rank, Range keys, std::int64_t part) {
  const Work& work = layout.work();
  const int place = layout.place(rank);
  const HeadShare& mine = layout.heads(layout.column(rank));
  const Range segments[] = {text_range(work, work.rows, layout.text_share(place)),
                            image_range(work, layout.row_chunk(place))};
  Phase phase;
  for (const Range& rows : segments) {
    const double pairs = visible_pairs(work, rows, keys);
    if (pairs == 0) continue;
    for (const std::int64_t run : mine.runs) {
      phase.attention_ms += machine.attention_ms(work, run, rows.size(), keys.size(), pairs);
      phase.copying_ms += machine.copy_ms(merged_bytes(layout, mine, part, rows.size(), run));
    }
  }
  phase.ms = phase.attention_ms + phase.copying_ms;
  return phase;
}

void add(Phase& to, const Phase& phase) {
  to.ms += phase.ms;
  to.attention_ms += phase.attention_ms;
  to.copying_ms += phase.copying_ms;
}

// Clearing before and rounding after the parts of several runs of heads.
double frame_ms(const Layout& layout, const Machine& machine, int rank) {
  const HeadShare& mine = layout.heads(layout.column(rank));
  if (mine.is_one_run()) return 0;
  const int place = layout.place(rank);
  const std::int64_t rows = layout.row_chunk(place).size() + layout.text_share(place).size();
  const std::int64_t elements = layout.elements(rows, mine.query);
  return machine.copy_ms(elements * kFloat) + machine.copy_ms(elements * (kFloat + layout.work().element));
}

Phase text_keys(const Layout& layout, const Machine& machine, int rank) {
  const Work& work = layout.work();
  return step_of(layout, machine, rank, text_range(work, work.keys, {0, work.text}), 0);
}

// Parts that come of the text's keys.
std::int64_t text_parts(const Layout& layout) { return layout.work().text > 0 ? 1 : 0; }

// Keys of a step come while those of the step before are computed with; the place before sends them when it begins that
// step, this one takes them when it does.
Phase ring_of(const Layout& layout, const Machine& machine, int column) {
  const auto places = static_cast<std::size_t>(layout.places());
  const int ulysses = layout.mesh().ulysses;
  const auto rank_at = [&](std::size_t place) { return static_cast<int>(place) * ulysses + column; };
  std::vector<Phase> done(places);  // `ms`: when a place begins its step
  std::int64_t part = text_parts(layout);
  for (std::size_t step = 0; step < places; ++step, ++part) {
    std::vector<Phase> next = done;
    for (std::size_t place = 0; place < places; ++place) {
      const std::size_t before = (place + places - 1) % places;
      const auto chunk = static_cast<int>((place + places - step) % places);
      const Range keys = image_range(layout.work(), layout.key_chunk(chunk));
      add(next[place], step_of(layout, machine, rank_at(place), keys, part));
      if (step == 0) add(next[place], text_keys(layout, machine, rank_at(place)));
      if (step + 1 == places) continue;
      const double sent = std::max(done[place].ms, done[before].ms);
      const Message message = layout.ring_step(rank_at(before), static_cast<int>(step));
      const double begin = done[place].ms;
      next[place].ms = begin + beside_ms(next[place].ms - begin, sent - begin + machine.message_ms(message),
                                         machine.link_of(message));
    }
    done = std::move(next);
  }
  return *std::ranges::max_element(done, {}, &Phase::ms);
}

// The own keys are copied to the others' places.
Phase gathered_of(const Layout& layout, const Machine& machine, int rank, double gather_ms) {
  const std::int64_t own = layout.key_chunk(layout.place(rank)).size();
  const double copy_ms = machine.copy_ms(4 * layout.bytes(own, layout.heads(layout.column(rank)).kv));
  Phase phase = text_keys(layout, machine, rank);
  phase.copying_ms += copy_ms;
  phase.ms = beside_ms(phase.ms + copy_ms, gather_ms, machine.link_of(layout.gather(rank)));
  add(phase, step_of(layout, machine, rank, image_range(layout.work(), {0, layout.work().keys}), text_parts(layout)));
  return phase;
}

// The back end's calls for a column's heads, part by part, beside what is exchanged meanwhile.
Phase whole_of(const Layout& layout, const Machine& machine, int rank, const HeadExchange& heads, double exchanged_ms) {
  const Work& work = layout.work();
  const Range rows{0, work.rows + work.text};
  const Range keys{0, work.keys + work.text};
  Phase phase;
  const parallel::Heads mine =
      parallel::heads_of(work.heads, work.kv_heads, layout.mesh().ulysses, layout.column(rank), heads.cut);
  for (const parallel::HeadRun& run : mine.runs) {
    phase.attention_ms +=
        machine.attention_ms(work, run.query.size(), rows.size(), keys.size(), visible_pairs(work, rows, keys));
  }
  phase.ms = beside_ms(phase.attention_ms, exchanged_ms, machine.inside);
  return phase;
}

}  // namespace

double Machine::attention_ms(const Work& work, std::int64_t heads, std::int64_t rows, std::int64_t keys,
                             double pairs) const {
  const auto size = static_cast<double>(work.head_size);
  const double seen = pairs / static_cast<double>(rows);  // keys, on average
  const double unit_rate = rate_at(kernel, size) * 1e12 / gpu.units;
  double best = std::numeric_limits<double>::infinity();
  for (const Tile& tile : kernel.tiles) {
    const std::int64_t tiles = work.batch * heads * ((rows + tile.rows - 1) / tile.rows);
    const std::int64_t rounds = (tiles + gpu.units - 1) / gpu.units;
    const double operations = static_cast<double>(tile.rows) * tile.cost * 4 * (seen + kernel.extra_keys) * size;
    best = std::min(best, static_cast<double>(rounds) * operations / unit_rate);
  }
  return keys == 0 ? 0 : best * 1e3 + kernel.call_us * 1e-3;
}

double Machine::copy_ms(std::int64_t bytes) const {
  if (bytes == 0) return 0;
  return static_cast<double>(bytes) / gpu.copy_gb_per_s * 1e-6 + gpu.copy_us * 1e-3;
}

const LinkFigures& Machine::link_of(const Batch& batch) const {
  const auto crosses = [&](const Message& message) { return &link_of(message) == &between; };
  return std::ranges::any_of(batch, crosses) ? between : inside;
}

double beside_ms(double computing_ms, double transfer_ms, const LinkFigures& link) {
  return computing_ms + transfer_ms - link.hidden * std::min(computing_ms, transfer_ms);
}

// Copy engines serve ranks of one node. Where keys are shared out too, all heads go at once.
HeadExchange head_exchange(const Layout& layout, const Machine& machine) {
  HeadExchange heads;
  if (layout.mesh().ulysses == 1) return heads;
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    if (!machine.link_of(layout.before(rank)).copy_engines) return heads;
  }
  heads.as_they_lie = true;
  if (layout.places() > 1) return heads;
  const Work& work = layout.work();
  const std::int64_t most = layout.heads(0).query;
  heads.cut = parallel::cut_that_pays(most, work.batch, work.rows + work.text, machine.gpu.units);
  const auto share_of = [&](std::int64_t part) { return static_cast<double>(part) / static_cast<double>(most); };
  const auto between = most - heads.cut.first - heads.cut.last;
  heads.first = share_of(heads.cut.first > 0 ? heads.cut.first : between);
  heads.last = share_of(heads.cut.last > 0 ? heads.cut.last : between);
  return heads;
}

double Machine::exchange_ms(const std::vector<Batch>& batches, int ranks) const {
  struct Sums {
    double out = 0, in = 0;
    [[nodiscard]] double ms(const LinkFigures& link) const {
      if (out == 0 && in == 0) return 0;
      return std::max(out, in) / link.gb_per_s * 1e-6 + link.latency_us * 1e-3;
    }
  };
  std::vector<Sums> near(static_cast<std::size_t>(ranks));
  std::vector<Sums> far(near.size());
  for (const Batch& batch : batches) {
    for (const Message& message : batch) {
      auto& sums = &link_of(message) == &inside ? near : far;
      sums[static_cast<std::size_t>(message.from)].out += static_cast<double>(message.bytes);
      sums[static_cast<std::size_t>(message.to)].in += static_cast<double>(message.bytes);
    }
  }
  double slowest = 0;
  for (std::size_t rank = 0; rank < near.size(); ++rank) {
    slowest = std::max({slowest, near[rank].ms(inside), far[rank].ms(between)});
  }
  return slowest;
}

double Machine::message_ms(const Message& message) const {
  const LinkFigures& link = link_of(message);
  if (message.bytes == 0) return 0;
  return static_cast<double>(message.bytes) / link.gb_per_s * 1e-6 + link.latency_us * 1e-3;
}

// Row i sees the keys up to i + Skv − Sq, as FLASH_ATTN aligns them; the sum over rows of what of it lies in `keys`.
double visible_pairs(const Work& work, Range rows, Range keys) {
  const auto width = static_cast<double>(keys.size());
  if (rows.size() == 0 || keys.size() == 0) return 0;
  if (!work.causal) return static_cast<double>(rows.size()) * width;
  const std::int64_t offset = work.keys - work.rows - keys.begin;
  const auto up_to = [&](std::int64_t end) {  // of the rows before `end`
    const auto seen = static_cast<double>(std::max<std::int64_t>(end + offset, 0));
    return seen <= width ? seen * (seen + 1) / 2 : width * (width + 1) / 2 + (seen - width) * width;
  };
  return up_to(rows.end) - up_to(rows.begin);
}

double exchange_ms(const Layout& layout, const Machine& machine, Batch (Layout::*batch)(int) const, double share) {
  std::vector<Batch> all(static_cast<std::size_t>(layout.ranks()));
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    Batch& own = all[static_cast<std::size_t>(rank)];
    own = (layout.*batch)(rank);
    for (Message& message : own) message.bytes = std::llround(share * static_cast<double>(message.bytes));
  }
  return machine.exchange_ms(all, layout.ranks());
}

Phase compute_phase(const Layout& layout, const Machine& machine, const HeadExchange& heads) {
  const auto later = [](const Phase& a, const Phase& b) { return a.ms < b.ms ? b : a; };
  Phase slowest;
  if (layout.places() == 1) {
    const double exchanged_ms = exchange_ms(layout, machine, &Layout::before, 1 - heads.first) +
                                exchange_ms(layout, machine, &Layout::after, 1 - heads.last);
    for (int rank = 0; rank < layout.ranks(); ++rank) {
      slowest = later(slowest, whole_of(layout, machine, rank, heads, exchanged_ms));
    }
    return slowest;
  }
  if (layout.mesh().ring > 1) {
    for (int column = 0; column < layout.mesh().ulysses; ++column) {
      slowest = later(slowest, ring_of(layout, machine, column));
    }
  } else {
    const double gather_ms = exchange_ms(layout, machine, &Layout::gather);
    for (int rank = 0; rank < layout.ranks(); ++rank) {
      slowest = later(slowest, gathered_of(layout, machine, rank, gather_ms));
    }
  }
  double frame = 0;
  for (int rank = 0; rank < layout.ranks(); ++rank) frame = std::max(frame, frame_ms(layout, machine, rank));
  slowest.copying_ms += frame;
  slowest.ms += frame;
  return slowest;
}

}  // namespace ditattn::planner
