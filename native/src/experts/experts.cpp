#include "experts/experts.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"

namespace kt {
namespace {

// Cost of a task that runs m rows, in arbitrary units: reading the weights dominates for few rows,
// arithmetic for many.
int64_t unit_cost(int32_t m) { return 8 + m; }

// Calls body(expert, first, last, next) for the units of a piece [lo, hi) of the cost axis on which
// every active expert occupies `units` consecutive tasks; next: the expert whose unit 0 the piece
// goes on with, or -1.
template <class Body>
void walk_costs(const Grouping& g, int64_t units, int64_t lo, int64_t hi, Body&& body) {
  int64_t start = 0;
  for (int32_t i = 0; i < g.num_active && start < hi; ++i) {
    const int32_t expert = g.active[i];
    const int64_t cost = unit_cost(g.start[expert + 1] - g.start[expert]);
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
    total += units * unit_cost(g.start[g.active[i] + 1] - g.start[g.active[i]]);
  }
  return total;
}

// One unit of phase 1: bands 2u and 2u + 1 of a part's gate and up. next: the gate band of this
// worker's next unit, or nullptr.
void up_unit(const ExpertJob& job, ExpertBuffers& buffers, int32_t worker, size_t p, int32_t expert,
             int64_t unit, const uint8_t* next) {
  const Matrix& gate = job.weights.gate->parts[p].matrix;
  const Matrix& up = job.weights.up->parts[p].matrix;
  const Weight& down = *job.weights.down;
  const int64_t mid_stride = act_row_bytes(down.act, down.cols);
  const auto w = static_cast<size_t>(worker);
  const Grouping& g = buffers.groupings[w];
  float* gate_out = buffers.temps[w];
  float* up_out = gate_out + kRowBlock * kUnitRows;
  const auto band = static_cast<int32_t>(2 * unit);
  const int32_t bands = std::min(2, gate.num_bands - band);
  const int32_t column = (job.weights.gate->parts[p].first_band + band) * kBandRows;
  const int32_t columns = std::min(kUnitRows, down.cols - column);
  for (int32_t at = g.start[expert]; at < g.start[expert + 1]; at += kRowBlock) {
    const int32_t m = std::min(kRowBlock, g.start[expert + 1] - at);
    for (int32_t b = 0; b < bands; ++b) {
      const int32_t at_band = band + b;
      job.matrix->multiply_band(gate, expert, at_band, job.x, job.x_stride, g.tokens + at, m,
                                gate_out + b * kBandRows, kUnitRows, buffers.scratch[w],
                                band_at(up, expert, at_band));
      job.matrix->multiply_band(up, expert, at_band, job.x, job.x_stride, g.tokens + at, m,
                                up_out + b * kBandRows, kUnitRows, buffers.scratch[w],
                                b + 1 < bands ? band_at(gate, expert, at_band + 1) : next);
    }
    for (int32_t i = 0; i < m; ++i) {
      float* row = gate_out + i * kUnitRows;
      job.vector->silu_mul(row, up_out + i * kUnitRows, columns, row);
      job.matrix->prepare(down.act, row, down.cols, column, columns,
                          buffers.mid + (at + i) * mid_stride);
    }
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
  for (int32_t i = 0; i < g.num_active; ++i) {
    const int32_t expert = g.active[i];
    for (int32_t at = g.start[expert]; at < g.start[expert + 1]; at += kRowBlock) {
      const int32_t m = std::min(kRowBlock, g.start[expert + 1] - at);
      for (auto band = static_cast<int32_t>(first); band < last; ++band) {
        const uint8_t* next = band + 1 < last        ? band_at(part.matrix, expert, band + 1)
                              : i + 1 < g.num_active ? band_at(part.matrix, g.active[i + 1],
                                                               static_cast<int32_t>(first))
                                                     : nullptr;
        job.matrix->multiply_band(part.matrix, expert, band, buffers.mid + at * mid_stride,
                                  mid_stride, nullptr, m, temp, kBandRows, buffers.scratch[w],
                                  next);
        const int64_t to = int64_t{part.first_band + band} * kBandRows;
        const auto count = static_cast<int32_t>(std::min<int64_t>(kBandRows, down.rows - to));
        job.vector->add_band(job.out + to, job.out_stride, g.tokens + at, g.weights + at, temp, m,
                             count);
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
    grouping.active = arena.allocate_array<int32_t>(max_experts);
    grouping.tokens = arena.allocate_array<int32_t>(max_pairs);
    grouping.weights = arena.allocate_array<float>(max_pairs);
    buffers.groupings.push_back(grouping);
    buffers.temps.push_back(arena.allocate_array<float>(2 * kRowBlock * kUnitRows));
    buffers.scratch.push_back(arena.allocate(multiply_scratch_bytes(max_cols)));
  }
}

void group_pairs(const int32_t* ids, const float* weights, int32_t num_tokens, int32_t top_k,
                 int32_t num_experts, Grouping& g) {
  const int32_t pairs = num_tokens * top_k;
  std::memset(g.start, 0, (static_cast<size_t>(num_experts) + 1) * sizeof(int32_t));
  for (int32_t i = 0; i < pairs; ++i) {
    if (ids[i] >= 0) {
      ++g.start[ids[i]];  // below 0: somebody else computes this pair
    }
  }
  // start[e] becomes the end of expert e, then counts down to its beginning while pairs are placed.
  g.num_active = 0;
  int32_t end = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    if (g.start[e] != 0) {
      g.active[g.num_active++] = e;
    }
    end += g.start[e];
    g.start[e] = end;
  }
  g.start[num_experts] = end;
  for (int32_t i = pairs - 1; i >= 0; --i) {
    if (ids[i] < 0) {
      continue;
    }
    const int32_t at = --g.start[ids[i]];
    g.tokens[at] = i / top_k;
    g.weights[at] = weights[i];
  }
}

void run_up(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers, int32_t worker) {
  const size_t parts = job.weights.gate->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = part_workers(workers, parts, p);
  const Grouping& g = buffers.groupings[static_cast<size_t>(worker)];
  const Matrix& gate = job.weights.gate->parts[p].matrix;
  const int64_t units = (gate.num_bands + 1) / 2;
  const int64_t cost = total_cost(g, units);
  // Tail pieces of about one unit of an average expert.
  const int64_t pairs = g.start[g.num_active == 0 ? 0 : g.active[g.num_active - 1] + 1];
  const int64_t chunk = 8 + pairs / std::max(g.num_active, 1);
  share_range(cost, worker - team.first, team.last - team.first, chunk, job.tails[p],
              [&](int64_t lo, int64_t hi) {
                walk_costs(g, units, lo, hi,
                           [&](int32_t expert, int64_t first, int64_t last, int32_t next) {
                             for (int64_t unit = first; unit < last; ++unit) {
                               const uint8_t* then =
                                   unit + 1 < last
                                       ? band_at(gate, expert, static_cast<int32_t>(2 * unit + 2))
                                   : next >= 0 ? band_at(gate, next, 0)
                                               : nullptr;
                               up_unit(job, buffers, worker, p, expert, unit, then);
                             }
                           });
              });
}

void run_down(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers,
              int32_t worker) {
  const size_t parts = job.weights.down->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = part_workers(workers, parts, p);
  const int64_t bands = job.weights.down->parts[p].matrix.num_bands;
  share_range(bands, worker - team.first, team.last - team.first, 1,
              job.tails[job.weights.gate->parts.size() + p], [&](int64_t first, int64_t last) {
                down_bands(job, buffers, worker, p, first, last);
              });
}

}  // namespace kt
