// Phase 1 of an expert layer: silu(gate) * up, prepared for the down matrix.
#include <algorithm>
#include <cstring>

#include "experts/costs.h"

namespace kt {
namespace {

// What phase 1 on one expert of one part needs.
struct UpTask {
  const ExpertJob& job;
  ExpertBuffers& buffers;
  size_t worker;
  size_t part;
  int32_t expert;
  int32_t next_expert;  // whose unit 0 follows the last unit, or -1

  const Matrix& gate() const { return job.weights.gate->parts[part].matrix; }
  const Matrix& up() const { return job.weights.up->parts[part].matrix; }
  const Grouping& grouping() const { return buffers.groupings[worker]; }
  float* gate_out() const { return buffers.temps[worker]; }
  float* up_out() const { return gate_out() + kPromptRows * kPromptUnits * kUnitRows; }
  uint8_t* scratch() const { return buffers.scratch[worker]; }
  // First gate band after `unit`, or nullptr; end: of the task's units.
  const uint8_t* after(int64_t unit, int64_t end) const {
    if (unit + 1 < end) {
      return band_at(gate(), expert, static_cast<int32_t>(2 * unit + 2));
    }
    return next_expert < 0 ? nullptr : band_at(gate(), next_expert, 0);
  }
};

// silu(gate) * up of m rows, pairs from `at` on, and of some units, prepared for the down matrix.
void finish_up(const UpTask& task, int32_t at, int32_t m, int64_t unit, int32_t units,
               bool is_prompt) {
  const Weight& down = *task.job.weights.down;
  const int64_t stride = act_row_bytes(down.act, down.cols);
  const int32_t first_band = task.job.weights.gate->parts[task.part].first_band;
  const auto column = static_cast<int32_t>((first_band + 2 * unit) * kBandRows);
  const int32_t width = units * kUnitRows, columns = std::min(width, down.cols - column);
  const bool whole = columns == width;  // rows lie next to each other
  const ActKind form = form_of(down.act, is_prompt);
  if (whole) {
    task.job.vector->silu_mul(task.gate_out(), task.up_out(), m * width, task.gate_out());
  }
  const int32_t start = task.grouping().start[task.expert];
  const int64_t count = task.grouping().prompt[task.expert];
  for (int32_t i = 0; i < m; ++i) {
    float* row = task.gate_out() + i * width;
    if (!whole) {
      task.job.vector->silu_mul(row, task.up_out() + i * width, columns, row);
    }
    if (form != kActBf16) {
      task.job.matrix->prepare(form, row, down.cols, column, columns,
                               task.buffers.mid + (at + i) * stride);
      continue;
    }
    // Line k of the rows of all prompt pairs lies together; prepare() goes 64 k bytes ahead itself.
    uint8_t* lines = task.buffers.mid + start * stride + 64 * (at - start + i);
    for (int32_t first = 0; first < columns; first += 32) {
      const int32_t k = (column + first) / 32;
      task.job.matrix->prepare(form, row + first, down.cols, column + first, 32,
                               lines + 64 * k * (count - 1));
    }
  }
}

// One unit of phase 1: bands 2u and 2u + 1 of a part's gate and up, for pairs [first, last). next:
// the gate band of this worker's next unit, or nullptr.
void up_unit(const UpTask& task, int64_t unit, int32_t first, int32_t last, bool is_prompt,
             const uint8_t* next) {
  const ExpertJob& job = task.job;
  const auto band = static_cast<int32_t>(2 * unit);
  const int32_t bands = std::min(2, task.gate().num_bands - band);
  for (int32_t at = first; at < last; at += kRowBlock) {
    const int32_t m = std::min(kRowBlock, last - at);
    const int32_t* tokens = task.grouping().tokens + at;
    for (int32_t b = 0; b < bands; ++b) {
      const int32_t now = band + b;
      job.matrix->multiply_band(task.gate(), task.expert, now, job.x, job.x_stride, tokens, m,
                                task.gate_out() + b * kBandRows, kUnitRows, task.scratch(),
                                band_at(task.up(), task.expert, now));
      job.matrix->multiply_band(task.up(), task.expert, now, job.x, job.x_stride, tokens, m,
                                task.up_out() + b * kBandRows, kUnitRows, task.scratch(),
                                b + 1 < bands ? band_at(task.gate(), task.expert, now + 1) : next);
    }
    finish_up(task, at, m, unit, 1, is_prompt);
  }
}

// Brings shares [first, last) of `shares` of the next expert's prompt rows into this core's cache.
void fetch_rows(const UpTask& task, int64_t first, int64_t last, int64_t shares) {
  const Grouping& g = task.grouping();
  const int64_t count = g.prompt[task.next_expert];
  for (int64_t i = count * first / shares; i < count * last / shares; ++i) {
    const int32_t token = g.tokens[g.start[task.next_expert] + i];
    const uint8_t* row = task.job.x + token * task.job.x_stride;
    for (int32_t at = 0; at < 2 * task.gate().cols; at += 64) {
      __builtin_prefetch(row + at, 0, 2);
    }
  }
}

// Copies the prepared rows of m tokens, line by line: [lines][m] of 64 bytes.
void gather_lines(const ExpertJob& job, const int32_t* tokens, int32_t m, int64_t lines,
                  uint8_t* to) {
  for (int64_t k = 0; k < lines; ++k) {
    for (int32_t i = 0; i < m; ++i, to += 64) {
      std::memcpy(to, job.x + tokens[i] * job.x_stride + 64 * k, 64);
    }
  }
}

// Asks for `lines` lines that this core is about to write and others have read: their stores would
// wait for each of them.
void fetch_to_write(const uint8_t* at, int64_t lines) {
#if defined(__x86_64__)
  for (; lines > 0; --lines, at += 64) {
    asm volatile("prefetchw %0" : : "m"(*at));
  }
#else
  static_cast<void>(at);
  static_cast<void>(lines);
#endif
}

// The same for what finish_up() is to write for prompt tokens.
void fetch_mid(const UpTask& task, int32_t at, int32_t m, int64_t unit, int32_t units) {
  const Weight& down = *task.job.weights.down;
  if (form_of(down.act, true) != kActBf16) {
    return;
  }
  const int32_t start = task.grouping().start[task.expert];
  const int64_t count = task.grouping().prompt[task.expert];
  const int64_t k = task.job.weights.gate->parts[task.part].first_band / 2 + unit;
  const uint8_t* lines = task.buffers.mid + start * act_row_bytes(down.act, down.cols);
  for (int64_t i = k; i < std::min<int64_t>(k + units, down.cols / 32); ++i) {
    fetch_to_write(lines + 64 * (i * count + at - start), m);
  }
}

// Units [first, last) for prompt tokens: as many rows as fit are copied together once for all
// units.
void up_prompt(const UpTask& task, int64_t first, int64_t last) {
  const ExpertJob& job = task.job;
  const int32_t start = task.grouping().start[task.expert];
  const int32_t count = task.grouping().prompt[task.expert];
  const int64_t lines = task.gate().cols / 32;
  const int64_t fit = std::clamp<int64_t>(kGatherBytes / (64 * lines), 1, kPromptRows);
  const int64_t blocks = (count + fit - 1) / fit;
  for (int64_t block = 0; block < blocks; ++block) {
    const Range mine = split(count, block, blocks);
    const auto m = static_cast<int32_t>(mine.last - mine.first);
    const auto at = static_cast<int32_t>(start + mine.first);
    uint8_t* packed = task.buffers.rows[task.worker];
    gather_lines(job, task.grouping().tokens + at, m, lines, packed);
    const PromptRows rows = {.acts = packed, .row_stride = 64, .line_stride = 64 * m, .m = m};
    for (int64_t unit = first; unit < last; unit += kPromptUnits) {
      const auto units = static_cast<int32_t>(std::min<int64_t>(kPromptUnits, last - unit));
      if (block == 0 && task.next_expert >= 0) {
        fetch_rows(task, unit - first, unit - first + units, last - first);
      }
      const auto band = static_cast<int32_t>(2 * unit);
      const int32_t bands = std::min(2 * units, task.gate().num_bands - band);
      const int32_t width = units * kUnitRows;
      job.matrix->multiply_prompt(task.gate(), task.expert, band, bands, rows, task.gate_out(),
                                  width, task.scratch(), band_at(task.up(), task.expert, band));
      fetch_mid(task, at, m, unit, units);
      job.matrix->multiply_prompt(task.up(), task.expert, band, bands, rows, task.up_out(), width,
                                  task.scratch(), task.after(unit + units - 1, last));
      finish_up(task, at, m, unit, units, true);
    }
  }
}

void up_units(const UpTask& task, int64_t first, int64_t last) {
  const Grouping& g = task.grouping();
  const int32_t start = g.start[task.expert], end = g.start[task.expert + 1];
  const int32_t others = start + g.prompt[task.expert];
  const bool in_tiles = task.gate().act == kActQ8;
  if (others > start && in_tiles) {
    up_prompt(task, first, last);
  } else {
    fetch_start(band_at(task.gate(), task.expert, static_cast<int32_t>(2 * first)),
                task.gate().band_bytes);
  }
  for (int64_t unit = first; unit < last; ++unit) {
    if (others > start && !in_tiles) {
      up_unit(task, unit, start, others, true, task.after(unit, last));
    }
    up_unit(task, unit, others, end, false, task.after(unit, last));
  }
}

// How phase 1 on one part is shared out, on an axis of costs.
struct UpShare {
  int64_t units;
  int64_t cost;
  int64_t chunk;  // least cost of the last pieces

  // Tail pieces of about one unit of an average expert; of several where a worker that takes one
  // first copies the expert's rows.
  UpShare(const Grouping& g, const Matrix& gate)
      : units((gate.num_bands + 1) / 2), cost(total_cost(g, units)) {
    chunk = 1 + cost / std::max<int64_t>(units * g.num_active, 1) *
                    (has_prompts(g) ? std::max<int64_t>(units / 4, 1) : 1);
  }
};

}  // namespace

void fetch_up(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers,
              int32_t worker) {
  const size_t parts = job.weights.gate->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = job_team(workers, job, parts, p);
  const Grouping& g = buffers.groupings[static_cast<size_t>(worker)];
  const Matrix& gate = job.weights.gate->parts[p].matrix;
  const UpShare share(g, gate);
  const int64_t fixed = fixed_units(share.cost, 1, team.last - team.first);
  const Range mine = split(fixed, worker - team.first, team.last - team.first);
  if (worker < team.first || mine.first == mine.last) {
    return;
  }
  bool found = false;
  walk_costs(g, share.units, mine.first, mine.last,
             [&](int32_t expert, int64_t unit, int64_t /*last*/, int32_t /*next*/) {
               if (!found) {
                 fetch_start(band_at(gate, expert, static_cast<int32_t>(2 * unit)),
                             gate.band_bytes);
               }
               found = true;
             });
}

void run_up(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers, int32_t worker) {
  const size_t parts = job.weights.gate->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = job_team(workers, job, parts, p);
  if (worker < team.first) {
    return;
  }
  const Grouping& g = buffers.groupings[static_cast<size_t>(worker)];
  const UpShare share(g, job.weights.gate->parts[p].matrix);
  share_range(share.cost, 1, worker - team.first, team.last - team.first, share.chunk, job.tails[p],
              [&](int64_t lo, int64_t hi) {
                walk_costs(g, share.units, lo, hi,
                           [&](int32_t expert, int64_t first, int64_t last, int32_t next) {
                             const auto w = static_cast<size_t>(worker);
                             up_units({job, buffers, w, p, expert, next}, first, last);
                           });
              });
  fetch_down(workers, job, buffers, worker);
}

}  // namespace kt
