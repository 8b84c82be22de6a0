// Phase 2 of an expert layer: the products with the down matrix, added up token by token.
#include <algorithm>
#include <cstring>
#include <thread>

#include "experts/costs.h"

namespace kt {
namespace {

// What phase 2 on bands [first, last) of one part needs. experts: of the active ones. out: where
// the first band's column of token 0 is summed up.
struct DownTask {
  const ExpertJob& job;
  ExpertBuffers& buffers;
  size_t worker;
  size_t part;
  int64_t first;
  int64_t last;
  Range experts;
  float* out;
  int64_t out_stride;

  const Weight& down() const { return *job.weights.down; }
  const Matrix& matrix() const { return down().parts[part].matrix; }
  const Grouping& grouping() const { return buffers.groupings[worker]; }
  int64_t column() const { return (down().parts[part].first_band + first) * kBandRows; }
  int64_t columns() const {
    return std::min<int64_t>((last - first) * kBandRows, down().rows - column());
  }
  int64_t mid_stride() const { return act_row_bytes(down().act, down().cols); }
  // The band that follows `band` - 1: of active expert i, or of the next one; or nullptr.
  const uint8_t* band_after(int64_t band, int32_t i) const {
    if (band < last) {
      return band_at(matrix(), grouping().active[i], static_cast<int32_t>(band));
    }
    const bool is_last = i + 1 == experts.last;
    return is_last ? nullptr
                   : band_at(matrix(), grouping().active[i + 1], static_cast<int32_t>(first));
  }
};

// Adds the sums of m pairs and of `count` bands to their tokens.
void add_bands(const DownTask& task, int32_t at, int32_t m, int64_t band, int32_t count,
               const float* sums, int32_t stride) {
  const Grouping& g = task.grouping();
  for (int32_t b = 0; b < count; ++b) {
    const int64_t to = (band + b - task.first) * kBandRows;
    const auto rows = static_cast<int32_t>(std::min<int64_t>(kBandRows, task.columns() - to));
    task.job.vector->add_band(task.out + to, task.out_stride, g.tokens + at, g.weights + at,
                              sums + b * kBandRows, stride, m, rows);
  }
}

// Prompt pairs of active expert i. Meanwhile the next expert's rows, which other workers have made,
// are brought into this core's cache.
void down_prompt(const DownTask& task, int32_t i) {
  const Grouping& g = task.grouping();
  const int64_t stride = task.mid_stride(), row_bytes = 2 * int64_t{task.down().cols};
  const int32_t start = g.start[g.active[i]], count = g.prompt[g.active[i]];
  const int64_t calls = (task.last - task.first + kPromptBands - 1) / kPromptBands;
  const uint8_t* ahead = nullptr;
  int64_t ahead_lines = 0;
  if (i + 1 < g.num_active) {
    const int32_t next = g.active[i + 1];
    ahead = task.buffers.mid + g.start[next] * stride;
    ahead_lines = std::min<int64_t>(g.prompt[next] * row_bytes, kGatherBytes) / 64;
  }
  const int64_t blocks = (count + kPromptRows - 1) / kPromptRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const Range mine = split(count, block, blocks);
    const auto at = static_cast<int32_t>(start + mine.first);
    PromptRows rows = {.acts = task.buffers.mid + start * stride + 64 * mine.first,
                       .row_stride = 64,
                       .line_stride = int64_t{64} * count,
                       .m = static_cast<int32_t>(mine.last - mine.first)};
    for (int64_t call = 0; call < calls; ++call) {
      if (block == 0 && ahead != nullptr) {
        const Range lines = split(ahead_lines, call, calls);
        rows.ahead = ahead + 64 * lines.first;
        rows.ahead_bytes = 64 * (lines.last - lines.first);
      } else {
        rows.ahead = nullptr;
        rows.ahead_bytes = 0;
      }
      const int64_t band = task.first + call * kPromptBands;
      const auto bands = static_cast<int32_t>(std::min<int64_t>(kPromptBands, task.last - band));
      const int32_t width = bands * kBandRows;
      float* sums = task.buffers.temps[task.worker];
      task.job.matrix->multiply_prompt(task.matrix(), g.active[i], static_cast<int32_t>(band),
                                       bands, rows, sums, width, task.buffers.scratch[task.worker],
                                       task.band_after(band + bands, i));
      add_bands(task, at, rows.m, band, bands, sums, width);
    }
  }
}

// The products of the task's experts with its bands, in id order. kept: [pairs, 16] takes the sums
// of the only band; nullptr adds them to the outputs.
void down_experts(const DownTask& task, float* kept) {
  const Grouping& g = task.grouping();
  const int64_t stride = task.mid_stride();
  if (task.experts.first < task.experts.last) {
    fetch_start(task.band_after(task.first, static_cast<int32_t>(task.experts.first)),
                (task.last - task.first) * task.matrix().band_bytes);
  }
  for (auto i = static_cast<int32_t>(task.experts.first); i < task.experts.last; ++i) {
    const int32_t expert = g.active[i];
    const int32_t end = g.start[expert + 1];
    int32_t at = g.start[expert];
    if (task.down().act == kActQ8 && g.prompt[expert] > 0) {
      down_prompt(task, i);
      at += g.prompt[expert];
    }
    for (; at < end; at += kRowBlock) {
      const int32_t m = std::min(kRowBlock, end - at);
      float* sums =
          kept != nullptr ? kept + int64_t{at} * kBandRows : task.buffers.temps[task.worker];
      for (int64_t band = task.first; band < task.last; ++band) {
        task.job.matrix->multiply_band(task.matrix(), expert, static_cast<int32_t>(band),
                                       task.buffers.mid + at * stride, stride, nullptr, m, sums,
                                       kBandRows, task.buffers.scratch[task.worker],
                                       task.band_after(band + 1, i));
        if (kept == nullptr) {
          add_bands(task, at, m, band, 1, sums, kBandRows);
        }
      }
    }
  }
}

// What the sums of the task's columns begin with: the residual, or 0.
void begin_sums(const DownTask& task, Range tokens) {
  const ExpertJob& job = task.job;
  const auto bytes = static_cast<size_t>(task.columns()) * 4;
  for (int64_t t = tokens.first; t < tokens.last; ++t) {
    if (job.used != nullptr && job.used[t] == 0) {
      continue;
    }
    float* out = task.out + t * task.out_stride;
    if (job.residual == nullptr) {
      std::memset(out, 0, bytes);
    } else if (const float* from = job.residual + t * job.residual_stride + task.column();
               from != out) {
      std::memcpy(out, from, bytes);
    }
  }
}

// Bands [first, last) of a part's down matrix. The sums of many tokens are kept next to each other
// until they are complete: rows of a power of two of columns would fall into few sets of the
// caches.
void down_bands(const ExpertJob& job, ExpertBuffers& buffers, size_t worker, size_t p,
                int64_t first, int64_t last) {
  const Range experts = {0, buffers.groupings[worker].num_active};
  DownTask task = {job, buffers, worker, p, first, last, experts, nullptr, 0};
  const int64_t fit = kGatherBytes / (int64_t{job.num_tokens} * kBandRows * 4) / 2 * 2;
  if (job.num_tokens < kCompactTokens || fit == 0) {
    task.out = job.out + task.column();
    task.out_stride = job.out_stride;
    begin_sums(task, {0, job.num_tokens});
    down_experts(task, nullptr);
    return;
  }
  for (; task.first < last; task.first = task.last) {
    task.last = std::min(task.first + fit, last);
    task.out = reinterpret_cast<float*>(buffers.rows[worker]);
    task.out_stride = (task.last - task.first) * kBandRows;
    begin_sums(task, {0, job.num_tokens});
    down_experts(task, nullptr);
    for (int32_t t = 0; t < job.num_tokens; ++t) {
      if (job.used == nullptr || job.used[t] != 0) {
        std::memcpy(job.out + t * job.out_stride + task.column(), task.out + t * task.out_stride,
                    static_cast<size_t>(task.columns()) * 4);
      }
    }
  }
}

// Segments `range` of a band of `segments`: the sums are kept until the last segment is there, and
// its worker adds them all, in id order.
void down_segments(const ExpertJob& job, ExpertBuffers& buffers, size_t worker, size_t p,
                   int64_t band, Range range, int64_t segments) {
  const Grouping& g = buffers.groupings[worker];
  const Range experts = {g.num_active * range.first / segments,
                         g.num_active * range.last / segments};
  DownTask task = {job, buffers, worker, p, band, band + 1, experts, nullptr, job.out_stride};
  const int64_t slot = job.weights.down->parts[p].first_band + band;
  float* kept = buffers.kept + slot * buffers.kept_pairs * kBandRows;
  down_experts(task, kept);
  std::atomic<int64_t>& arrived = buffers.arrived[slot].next;
  const int64_t count = range.last - range.first;
  if (arrived.fetch_add(count, std::memory_order_acq_rel) + count != segments) {
    return;
  }
  arrived.store(0, std::memory_order_relaxed);  // for the next layer, behind a barrier
  task.out = job.out + task.column();
  begin_sums(task, {0, job.num_tokens});
  for (int32_t i = 0; i < g.num_active; ++i) {
    const int32_t at = g.start[g.active[i]], end = g.start[g.active[i] + 1];
    add_bands(task, at, end - at, band, 1, kept + int64_t{at} * kBandRows, kBandRows);
  }
}

// Products of the task's bands with rows of one kind of active expert i: pairs [at, at + m), to
// sums [m, width].
void down_products(const DownTask& task, int32_t i, int32_t at, int32_t m, bool in_tiles,
                   int32_t next, float* sums) {
  const Grouping& g = task.grouping();
  const ExpertJob& job = task.job;
  const int32_t expert = g.active[i];
  const int64_t stride = task.mid_stride(), width = (task.last - task.first) * kBandRows;
  const uint8_t* mid = task.buffers.mid;
  uint8_t* scratch = task.buffers.scratch[task.worker];
  PromptRows rows = {.acts = mid + g.start[expert] * stride + 64 * int64_t{at - g.start[expert]},
                     .row_stride = 64,
                     .line_stride = int64_t{64} * g.prompt[expert],
                     .m = m};
  const Range calls = {0, (task.last - task.first + kPromptBands - 1) / kPromptBands};
  const int64_t ahead_lines =
      next < 0 ? 0
               : std::min<int64_t>(2 * int64_t{g.prompt[g.active[next]]} * task.down().cols,
                                   kGatherBytes) /
                     64;
  const int64_t step = in_tiles ? kPromptBands : 1;
  for (int64_t band = task.first; band < task.last; band += step) {
    const auto bands = static_cast<int32_t>(std::min(step, task.last - band));
    const auto b = static_cast<int32_t>(band);
    const uint8_t* then = nullptr;
    if (band + bands < task.last) {
      then = band_at(task.matrix(), expert, b + bands);
    } else if (next >= 0) {
      then = band_at(task.matrix(), g.active[next], static_cast<int32_t>(task.first));
    }
    float* to = sums + (band - task.first) * kBandRows;
    if (!in_tiles) {
      job.matrix->multiply_band(task.matrix(), expert, b, mid + at * stride, stride, nullptr, m, to,
                                width, scratch, then);
      continue;
    }
    if (ahead_lines > 0) {
      const Range lines = split(ahead_lines, (band - task.first) / kPromptBands, calls.last);
      rows.ahead = mid + g.start[g.active[next]] * stride + 64 * lines.first;
      rows.ahead_bytes = 64 * (lines.last - lines.first);
    }
    job.matrix->multiply_prompt(task.matrix(), expert, b, bands, rows, to, width, scratch, then);
  }
}

// Counters of a team that takes turns, each on a cache line of its own; 0 between layers.
struct Turns {
  std::atomic<int64_t>& taken;  // experts
  std::atomic<int64_t>& ready;  // workers whose tokens' sums have been begun
  std::atomic<int64_t>& turn;   // the expert whose products are added now
  std::atomic<int64_t>& left;   // workers that are done
};

void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
  for (int spins = 1; counter.load(std::memory_order_acquire) != value; ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins % 4096 == 0) {
      std::this_thread::yield();  // the one that is waited for may need this core
    }
  }
}

// All experts' products with the task's bands, shared by workers [0, size) of a team: they take
// experts as they come and add the products in turn, in id order. What a worker reads of the
// intermediate rows is its experts' share.
void down_in_turn(DownTask task, Turns turns, int64_t index, int64_t size) {
  const Grouping& g = task.grouping();
  const ExpertJob& job = task.job;
  const int64_t width = (task.last - task.first) * kBandRows;
  const auto fit =
      static_cast<int32_t>(std::clamp<int64_t>(kGatherBytes / 4 / width, 1, kPromptRows));
  auto* sums = reinterpret_cast<float*>(task.buffers.rows[task.worker]);
  const auto columns = static_cast<int32_t>(task.columns());
  begin_sums(task, split(job.num_tokens, index, size));
  turns.ready.fetch_add(1, std::memory_order_release);
  const auto take = [&] {
    return static_cast<int32_t>(turns.taken.fetch_add(1, std::memory_order_relaxed));
  };
  for (int32_t i = take(); i < g.num_active; i = take()) {
    // Workers of equal speed take every size-th expert: its first weights and rows are asked for.
    const auto next = static_cast<int32_t>(i + size < g.num_active ? i + size : -1);
    const int32_t start = g.start[g.active[i]], end = g.start[g.active[i] + 1];
    const int32_t others = start + g.prompt[g.active[i]];
    for (int32_t at = start; at < end;) {
      const bool in_tiles = at < others;
      const int32_t m =
          std::min({fit, (in_tiles ? others : end) - at, in_tiles ? kPromptRows : kRowBlock});
      down_products(task, i, at, m, in_tiles, next, sums);
      if (at == start) {
        wait_for(turns.turn, i);
        if (i == 0) {
          wait_for(turns.ready, size);
        }
      }
      for (int32_t row = 0; row < m; ++row) {
        float* out = task.out + g.tokens[at + row] * task.out_stride;
        job.vector->add_scaled(out, g.weights[at + row], sums + row * width, columns, out);
      }
      at += m;
    }
    turns.turn.store(i + 1, std::memory_order_release);
  }
  if (turns.left.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    for (std::atomic<int64_t>* counter : {&turns.taken, &turns.ready, &turns.turn, &turns.left}) {
      counter->store(0, std::memory_order_relaxed);  // for the next layer, behind a barrier
    }
  }
}

// The part's down matrix for prompt tokens: teams of about kTurnWorkers share the bands of their
// part. False when there are too few bands or experts for that.
bool down_in_teams(const ExpertJob& job, ExpertBuffers& buffers, size_t worker, size_t p,
                   int64_t index, int64_t size) {
  const WeightPart& part = job.weights.down->parts[p];
  const int64_t pairs = (part.matrix.num_bands + 1) / 2;
  const int32_t num_active = buffers.groupings[worker].num_active;
  if (job.weights.down->act != kActQ8 || part.matrix.num_bands < 4 * size ||
      num_active < 4 * kTurnWorkers) {
    return false;
  }
  const int64_t teams = std::max<int64_t>(1, size / kTurnWorkers), team = index * teams / size;
  const int64_t lo = (team * size + teams - 1) / teams,
                hi = ((team + 1) * size + teams - 1) / teams;
  const int64_t first = 2 * (pairs * lo / size);
  const int64_t last = std::min<int64_t>(2 * (pairs * hi / size), part.matrix.num_bands);
  DownTask task = {job, buffers, worker, p, first, last, {0, num_active}, nullptr, job.out_stride};
  task.out = job.out + task.column();
  TailCounter* counters = buffers.arrived + part.first_band + first;  // a team has four bands
  down_in_turn(task, {counters[0].next, counters[1].next, counters[2].next, counters[3].next},
               index - lo, hi - lo);
  return true;
}

// How phase 2 on one part is shared out, on an axis of segments of bands.
struct DownShare {
  bool prompts;
  int64_t bands;
  int64_t step;      // bands that are multiplied together
  int64_t segments;  // of `step` bands: pieces of their experts
  int64_t chunk;     // least segments of the last pieces

  // A worker's share is a few bands of all experts, too coarse to balance with: the last ones are
  // cut into segments of a few experts. Prompt tokens are multiplied with two bands at a time.
  DownShare(const Grouping& g, const Matrix& down, int64_t kept_pairs)
      : prompts(has_prompts(g)), bands(down.num_bands) {
    const int64_t band_bytes = g.num_active * down.band_bytes;
    const int64_t most = prompts || num_pairs(g) > kept_pairs ? 1 : 8;
    segments = std::clamp<int64_t>(band_bytes / kPieceBytes, 1, most);
    chunk = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(band_bytes, 1));
    step = prompts ? 2 : 1;
  }
  int64_t count() const { return (bands + step - 1) / step * segments; }
};

}  // namespace

void fetch_down(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers,
                int32_t worker) {
  const size_t parts = job.weights.down->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = job_team(workers, job, parts, p);
  const Grouping& g = buffers.groupings[static_cast<size_t>(worker)];
  const Matrix& down = job.weights.down->parts[p].matrix;
  const DownShare share(g, down, buffers.kept_pairs);
  const int64_t fixed = fixed_units(share.count(), share.segments, team.last - team.first);
  const Range mine = split(fixed, worker - team.first, team.last - team.first);
  if (worker >= team.first && !share.prompts && mine.first < mine.last && g.num_active > 0) {
    fetch_start(band_at(down, g.active[0], static_cast<int32_t>(mine.first)),
                (mine.last - mine.first) * down.band_bytes);
  }
}

void run_down(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers,
              int32_t worker) {
  const size_t parts = job.weights.down->parts.size();
  const size_t p = part_of_worker(workers, parts, worker);
  const Range team = job_team(workers, job, parts, p);
  if (worker < team.first) {
    return;
  }
  const Grouping& g = buffers.groupings[static_cast<size_t>(worker)];
  const DownShare share(g, job.weights.down->parts[p].matrix, buffers.kept_pairs);
  const int64_t segments = share.segments, step = share.step;
  const auto w = static_cast<size_t>(worker);
  const auto run = [&](int64_t lo, int64_t hi) {
    while (lo < hi) {
      const int64_t band = lo / segments, begin = lo % segments;
      if (begin != 0 || hi - lo < segments) {
        const int64_t end = std::min(segments, begin + hi - lo);
        down_segments(job, buffers, w, p, band, {begin, end}, segments);
        lo += end - begin;
        continue;
      }
      down_bands(job, buffers, w, p, step * band, std::min(step * (hi / segments), share.bands));
      lo = hi / segments * segments;
    }
  };
  const int64_t index = worker - team.first, size = team.last - team.first;
  TailCounter& tail = job.tails[job.weights.gate->parts.size() + p];
  if (share.prompts && down_in_teams(job, buffers, w, p, index, size)) {
    return;
  }
  if (!share.prompts) {
    share_range(share.count(), segments, index, size, share.chunk, tail, run);
    return;
  }
  // Each run of bands reads the intermediate rows of all pairs, most of them from other cores'
  // caches: one long run for every worker, then single pairs of bands for those that are done.
  const int64_t count = share.count();
  const int64_t fixed = size == 1 ? count : count * 3 / 4 / size;
  run(index * fixed, (index + 1) * fixed);
  for (int64_t i = size * fixed + tail.next.fetch_add(1, std::memory_order_relaxed); i < count;
       i = size * fixed + tail.next.fetch_add(1, std::memory_order_relaxed)) {
    run(i, i + 1);
  }
}

}  // namespace kt
