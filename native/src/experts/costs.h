// What both phases of an expert layer share: the cost of an expert's rows, and who does what.
#pragma once

#include <algorithm>
#include <cstdint>

#include "experts/experts.h"

namespace kt {

// Cost of a task on an expert's rows, in arbitrary units: reading the weights dominates for few
// rows, arithmetic for many. A prompt row costs a sixth, after the weights have been decoded (by
// the time of 24 such rows).
inline int64_t unit_cost(const Grouping& g, int32_t expert) {
  const int32_t prompt = g.prompt[expert];
  const int32_t others = g.start[expert + 1] - g.start[expert] - prompt;
  return (others == 0 ? 0 : 8 + others) + (prompt == 0 ? 0 : 4 + prompt / 6);
}

inline bool has_prompts(const Grouping& g) {
  for (int32_t i = 0; i < g.num_active; ++i) {
    if (g.prompt[g.active[i]] > 0) {
      return true;
    }
  }
  return false;
}

inline int32_t num_pairs(const Grouping& g) {
  return g.num_active == 0 ? 0 : g.start[g.active[g.num_active - 1] + 1];
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
    if (start + units * cost <= lo) {
      start += units * cost;
      continue;
    }
    // A unit belongs to the piece in which its cost begins.
    const int64_t first = lo <= start ? 0 : std::min(units, (lo - start + cost - 1) / cost);
    const int64_t last = std::min(units, (hi - start + cost - 1) / cost);
    start += units * cost;
    if (first < last) {
      body(expert, first, last, start < hi && i + 1 < g.num_active ? g.active[i + 1] : -1);
    }
  }
}

inline int64_t total_cost(const Grouping& g, int64_t units) {
  int64_t total = 0;
  for (int32_t i = 0; i < g.num_active; ++i) {
    total += units * unit_cost(g, g.active[i]);
  }
  return total;
}

// A worker's first weights behind a jump: as far as the kernels look ahead, they ask for what comes
// after these.
inline void fetch_start(const uint8_t* weights, int64_t num_bytes) {
  constexpr int64_t kMost = 12 << 10;
  for (int64_t at = 0; at < std::min(num_bytes, kMost); at += 64) {
    __builtin_prefetch(weights + at, 0, 2);
  }
}

// The workers that share part p of the job.
inline Range job_team(const Workers& workers, const ExpertJob& job, size_t parts, size_t p) {
  Range team = part_workers(workers, parts, p);
  team.first = std::max<int64_t>(team.first, std::min<int64_t>(job.first_worker, team.last - 1));
  return team;
}

}  // namespace kt
