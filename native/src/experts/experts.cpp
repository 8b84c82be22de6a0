#include "experts/experts.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"

namespace kt {
namespace {

// Cost of a task on an expert's rows, in arbitrary units: reading the weights dominates for few
// rows, arithmetic for many. A prompt row costs a seventh, after the weights have been decoded.
int64_t unit_cost(const Grouping& g, int32_t expert) {
  const int32_t prompt = g.prompt[expert];
  const int32_t others = g.start[expert + 1] - g.start[expert] - prompt;
  return 8 + others + (prompt == 0 ? 0 : (others == 0 ? 0 : 6) + prompt / 7);
}

// Calls body(expert, first, last, next) for the units of a piece [lo, hi) of the cost axis on which
// every active expert occupies `units` consecutive tasks; next: the expert whose unit 0 the piece
// goes on with, or -1.
template <class Body>
void walk_costs(const Grouping& g, int64_t units, int64_t lo, int64_t hi, Body&& body) {
  int64_t start = 0;
  for (int32_t i = 0; i < g.num_active && start < hi; ++i) {
    const int32_t expert = g.active[i];
    const int64_t cost = unit_cost(g, expert);
    // A unit belongs to the piece in which its cost begins.
    const int64_t first = lo <= start ? 0 : std::min(units, (lo - start + cost - 1) / cost);
    const int64_t last = std::min(units, (hi - start + cost - 1) / cost);
    start += units * cost;
    if (first < last) {
      body(expert, first, last, start < hi && i + 1 < g.num_active ? g.active[i + 1] : -1);
    }
  }
}

int64_t total_cost(const Grouping& g, int64_t units) {
  int64_t total = 0;
  for (int32_t i = 0; i < g.num_active; ++i) {
    total += units * unit_cost(g, g.active[i]);
  }
  return total;
}

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
  float* up_out() const { return gate_out() + kPromptRows * kUnitRows; }
  uint8_t* scratch() const { return buffers.scratch[worker]; }
  // First gate band after `unit`, or nullptr; end: of the task's units.
  const uint8_t* after(int64_t unit, int64_t end) const {
    if (unit + 1 < end) {
      return band_at(gate(), expert, static_cast<int32_t>(2 * unit + 2));
    }
    return next_expert < 0 ? nullptr : band_at(gate(), next_expert, 0);
  }
};

// silu(gate) * up of m rows of one unit, prepared for the down matrix.
void finish_up(const UpTask& task, int32_t at, int32_t m, int64_t unit, bool is_prompt) {
  const Weight& down = *task.job.weights.down;
  const int64_t stride = act_row_bytes(down.act, down.cols);
  const int32_t first_band = task.job.weights.gate->parts[task.part].first_band;
  const auto column = static_cast<int32_t>((first_band + 2 * unit) * kBandRows);
  const int32_t columns = std::min(kUnitRows, down.cols - column);
  for (int32_t i = 0; i < m; ++i) {
    float* row = task.gate_out() + i * kUnitRows;
    task.job.vector->silu_mul(row, task.up_out() + i * kUnitRows, columns, row);
    task.job.matrix->prepare(form_of(down.act, is_prompt), row, down.cols, column, columns,
                             task.buffers.mid + (at + i) * stride);
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
    finish_up(task, at, m, unit, is_prompt);
  }
}

// Units [first, last) for prompt tokens: as many rows as fit are copied together once for all
// units.
void up_prompt(const UpTask& task, int64_t first, int64_t last) {
  const ExpertJob& job = task.job;
  const int32_t start = task.grouping().start[task.expert];
  const int32_t count = task.grouping().prompt[task.expert];
  const int64_t stride = act_row_bytes(kActBf16, task.gate().cols);
  const int64_t fit = std::clamp<int64_t>(kGatherBytes / stride, 1, kPromptRows);
  const int64_t blocks = (count + fit - 1) / fit;
  uint8_t* rows = task.buffers.rows[task.worker];
  for (int64_t block = 0; block < blocks; ++block) {
    const Range mine = split(count, block, blocks);
    const auto m = static_cast<int32_t>(mine.last - mine.first);
    const auto at = static_cast<int32_t>(start + mine.first);
    for (int32_t i = 0; i < m; ++i) {
      std::memcpy(rows + i * stride, job.x + task.grouping().tokens[at + i] * job.x_stride,
                  static_cast<size_t>(2 * task.gate().cols));
    }
    for (int64_t unit = first; unit < last; ++unit) {
      const auto band = static_cast<int32_t>(2 * unit);
      const int32_t bands = std::min(2, task.gate().num_bands - band);
      job.matrix->multiply_prompt(task.gate(), task.expert, band, bands, rows, stride, m,
                                  task.gate_out(), kUnitRows, task.scratch(),
                                  band_at(task.up(), task.expert, band));
      job.matrix->multiply_prompt(task.up(), task.expert, band, bands, rows, stride, m,
                                  task.up_out(), kUnitRows, task.scratch(), task.after(unit, last));
      finish_up(task, at, m, unit, true);
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
  }
  for (int64_t unit = first; unit < last; ++unit) {
    if (others > start && !in_tiles) {
      up_unit(task, unit, start, others, true, task.after(unit, last));
    }
    up_unit(task, unit, others, end, false, task.after(unit, last));
  }
}

// Bands [first, last) of a part's down matrix for all experts, in id order.
void down_bands(const ExpertJob& job, ExpertBuffers& buffers, int32_t worker, size_t p,
                int64_t first, int64_t last) {
  const Weight& down = *job.weights.down;
  const WeightPart& part = down.parts[p];
  const int64_t mid_stride = act_row_bytes(down.act, down.cols);
  const auto w = static_cast<size_t>(worker);
  const Grouping& g = buffers.groupings[w];
  float* temp = buffers.temps[w];
  const int64_t column = (part.first_band + first) * kBandRows;
  const int64_t columns = std::min<int64_t>((last - first) * kBandRows, down.rows - column);
  for (int32_t t = 0; t < job.num_tokens; ++t) {
    if (job.used != nullptr && job.used[t] == 0) {
      continue;
    }
    float* out = job.out + t * job.out_stride + column;
    if (job.residual == nullptr) {
      std::memset(out, 0, static_cast<size_t>(columns) * 4);
    } else if (job.residual != job.out) {
      std::memcpy(out, job.residual + t * job.residual_stride + column,
                  static_cast<size_t>(columns) * 4);
    }
  }
  const auto add_bands = [&](int32_t at, int32_t m, int64_t band, int32_t count, int32_t stride) {
    for (int32_t b = 0; b < count; ++b) {
      const int64_t to = (part.first_band + band + b) * kBandRows;
      const auto rows = static_cast<int32_t>(std::min<int64_t>(kBandRows, down.rows - to));
      job.vector->add_band(job.out + to, job.out_stride, g.tokens + at, g.weights + at,
                           temp + b * kBandRows, stride, m, rows);
    }
  };
  for (int32_t i = 0; i < g.num_active; ++i) {
    const int32_t expert = g.active[i];
    const auto after = [&](int64_t band) -> const uint8_t* {
      if (band < last) {
        return band_at(part.matrix, expert, static_cast<int32_t>(band));
      }
      const bool is_last = i + 1 == g.num_active;
      return is_last ? nullptr : band_at(part.matrix, g.active[i + 1], static_cast<int32_t>(first));
    };
    const int32_t end = g.start[expert + 1];
    int32_t at = g.start[expert];
    const int32_t others = at + (down.act == kActQ8 ? g.prompt[expert] : 0);
    for (; at < others;) {
      const int32_t m = std::min(kPromptRows, others - at);
      for (int64_t band = first; band < last; band += 2) {
        const auto count = static_cast<int32_t>(std::min<int64_t>(2, last - band));
        job.matrix->multiply_prompt(part.matrix, expert, static_cast<int32_t>(band), count,
                                    buffers.mid + at * mid_stride, mid_stride, m, temp, kUnitRows,
                                    buffers.scratch[w], after(band + 2));
        add_bands(at, m, band, count, kUnitRows);
      }
      at += m;
    }
    for (; at < end; at += kRowBlock) {
      const int32_t m = std::min(kRowBlock, end - at);
      for (int64_t band = first; band < last; ++band) {
        job.matrix->multiply_band(part.matrix, expert, static_cast<int32_t>(band),
                                  buffers.mid + at * mid_stride, mid_stride, nullptr, m, temp,
                                  kBandRows, buffers.scratch[w], after(band + 1));
        add_bands(at, m, band, 1, kBandRows);
      }
    }
  }
}

}  // namespace

void check_expert_weights(const ExpertWeights& w, const char* op) {
  const auto text = [](const Weight* weight) { return describe_weight(*weight); };
  const std::string shapes =
      "gate " + text(w.gate) + ", up " + text(w.up) + ", down " + text(w.down);
  if (w.gate->rows != w.up->rows || w.gate->cols != w.up->cols || w.gate->rows != w.down->cols ||
      w.gate->num_experts != w.up->num_experts || w.gate->num_experts != w.down->num_experts) {
    fail_argument(std::string(op) + ": expert matrices do not fit together: " + shapes);
  }
  if (w.gate->act != w.up->act) {
    fail_unsupported(std::string(op) + ": gate and up need one activation format: " + shapes);
  }
}

void allocate_expert_buffers(Workers& workers, Arena& arena, int64_t max_pairs, int32_t max_experts,
                             int64_t mid_row_bytes, int32_t max_cols, ExpertBuffers& buffers) {
  buffers.max_pairs = max_pairs;
  buffers.max_experts = max_experts;
  buffers.mid = arena.allocate(max_pairs * mid_row_bytes);
  for (int32_t w = 0; w < workers.num_threads(); ++w) {
    Grouping grouping;
    grouping.start = arena.allocate_array<int32_t>(max_experts + 1);
    grouping.prompt = arena.allocate_array<int32_t>(max_experts);
    grouping.active = arena.allocate_array<int32_t>(max_experts);
    grouping.tokens = arena.allocate_array<int32_t>(max_pairs);
    grouping.weights = arena.allocate_array<float>(max_pairs);
    buffers.groupings.push_back(grouping);
    buffers.temps.push_back(arena.allocate_array<float>(2 * kPromptRows * kUnitRows));
    const bool gathers = matrix_kernels(workers.isa())->multiply_prompt != nullptr;
    buffers.rows.push_back(
        gathers ? arena.allocate(std::max(kGatherBytes, act_row_bytes(kActBf16, max_cols)))
                : nullptr);
    buffers.scratch.push_back(arena.allocate(multiply_scratch_bytes(max_cols)));
  }
}

void group_pairs(const int32_t* ids, const float* weights, int32_t num_tokens, int32_t top_k,
                 int32_t num_experts, const uint8_t* is_prompt, Grouping& g) {
  const int32_t pairs = num_tokens * top_k;
  std::memset(g.start, 0, (static_cast<size_t>(num_experts) + 1) * sizeof(int32_t));
  std::memset(g.prompt, 0, static_cast<size_t>(num_experts) * sizeof(int32_t));
  for (int32_t t = 0; t < num_tokens; ++t) {
    const bool prompt = is_prompt != nullptr && is_prompt[t] != 0;
    for (int32_t i = t * top_k; i < (t + 1) * top_k; ++i) {
      if (ids[i] >= 0) {  // below 0: somebody else computes this pair
        ++g.start[ids[i]];
        g.prompt[ids[i]] += prompt;
      }
    }
  }
  // start[e] becomes the end of expert e, then counts down to its beginning while pairs are placed:
  // first the generated tokens', then the prompts'.
  g.num_active = 0;
  int32_t end = 0;
  bool mixed = false;
  for (int32_t e = 0; e < num_experts; ++e) {
    if (g.start[e] != 0) {
      g.active[g.num_active++] = e;
    }
    mixed = mixed || (g.prompt[e] != 0 && g.prompt[e] != g.start[e]);
    end += g.start[e];
    g.start[e] = end;
  }
  g.start[num_experts] = end;
  for (int32_t way = 0; way < (mixed ? 2 : 1); ++way) {
    for (int32_t i = pairs - 1; i >= 0; --i) {
      if (ids[i] < 0 || (mixed && (is_prompt[i / top_k] != 0) != (way == 1))) {
        continue;
      }
      const int32_t at = --g.start[ids[i]];
      g.tokens[at] = i / top_k;
      g.weights[at] = weights[i];
    }
  }
}

void run_up(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers, int32_t worker) {
  const size_t parts = job.weights.gate->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = part_workers(workers, parts, p);
  const Grouping& g = buffers.groupings[static_cast<size_t>(worker)];
  const int64_t units = (job.weights.gate->parts[p].matrix.num_bands + 1) / 2;
  const int64_t cost = total_cost(g, units);
  // Tail pieces of about one unit of an average expert; of several where a worker that takes one
  // first copies the expert's rows.
  const bool gathers = g.num_active > 0 && g.prompt[g.active[0]] > 0;
  const int64_t chunk = 1 + cost / std::max<int64_t>(units * g.num_active, 1) *
                                (gathers ? std::max<int64_t>(units / 4, 1) : 1);
  share_range(cost, worker - team.first, team.last - team.first, chunk, job.tails[p],
              [&](int64_t lo, int64_t hi) {
                walk_costs(g, units, lo, hi,
                           [&](int32_t expert, int64_t first, int64_t last, int32_t next) {
                             const auto w = static_cast<size_t>(worker);
                             up_units({job, buffers, w, p, expert, next}, first, last);
                           });
              });
}

void run_down(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers,
              int32_t worker) {
  const size_t parts = job.weights.down->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = part_workers(workers, parts, p);
  const int64_t bands = job.weights.down->parts[p].matrix.num_bands;
  const Grouping& g = buffers.groupings[static_cast<size_t>(worker)];
  const bool in_pairs = g.num_active > 0 && g.prompt[g.active[0]] > 0;
  const int64_t step = in_pairs ? 2 : 1;
  share_range((bands + step - 1) / step, worker - team.first, team.last - team.first, 1,
              job.tails[job.weights.gate->parts.size() + p], [&](int64_t first, int64_t last) {
                down_bands(job, buffers, worker, p, step * first, std::min(step * last, bands));
              });
}

}  // namespace kt
