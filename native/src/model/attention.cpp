#include "model/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace kt {
namespace {

int64_t kv_element(int32_t kv_type) { return kv_type == KT_KV_F32 ? 4 : 2; }

// Where the parts of a partial result lie.
struct State {
  float* max;
  float* sum;
  float* acc;
};

State state_at(float* memory) {
  return {memory, memory + kQueryRows, memory + 2 * int64_t{kQueryRows}};
}

void reset(const State& state, int32_t m, int32_t padded_dim) {
  for (int32_t i = 0; i < m; ++i) {
    state.max[i] = -std::numeric_limits<float>::infinity();
    state.sum[i] = 0.0f;
  }
  std::memset(state.acc, 0, static_cast<size_t>(m) * static_cast<size_t>(padded_dim) * 4);
}

void merge_rows(const VectorKernels& vector, const State& total, const State& part, int32_t m,
                int32_t padded_dim) {
  for (int32_t i = 0; i < m; ++i) {
    vector.merge(total.max + i, total.sum + i, total.acc + int64_t{i} * padded_dim, part.max[i],
                 part.sum[i], part.acc + int64_t{i} * padded_dim, padded_dim);
  }
}

// Position of a query in its row's context.
int32_t position_of(const AttentionCall& call, const AttentionUnit& unit, int32_t query) {
  return call.view->positions[unit.first + query];
}

// One segment of a unit for one KV head, into `part`.
void run_segment(const AttentionCall& call, const AttentionScratch& scratch,
                 const AttentionUnit& unit, int32_t head, int32_t segment, const State& part) {
  const AttentionOp& op = *call.op;
  const int32_t m = unit.count * op.group;
  const int32_t last_seen = position_of(call, unit, unit.count - 1) + 1;
  const int32_t begin = segment * kSegment;
  const int32_t end = std::min(last_seen, begin + kSegment);
  const int32_t page_size = call.config->page_size;
  const int32_t* pages = call.view->page_ids + call.view->page_start[unit.row];
  const int64_t element = kv_element(call.config->kv_type);
  reset(part, m, op.padded_dim);

  AttendBlock block = {};
  // Queries of a unit are stored together per head: [kv head][token][group][D].
  block.q = call.shared->queries +
            (int64_t{head} * call.view->num_tokens + unit.first) * op.group * op.head_dim;
  block.limits = scratch.limits;
  block.max = part.max;
  block.sum = part.sum;
  block.acc = part.acc;
  block.scores = scratch.scores;
  block.m = m;
  block.head_dim = op.head_dim;
  block.padded_dim = op.padded_dim;
  block.kv_type = call.config->kv_type;
  for (int32_t at = begin; at < end; at += kBlockPositions) {
    block.num_positions = std::min(kBlockPositions, end - at);
    for (int32_t i = 0; i < unit.count; ++i) {
      const int32_t limit = position_of(call, unit, i) + 1 - at;
      for (int32_t g = 0; g < op.group; ++g) {
        scratch.limits[i * op.group + g] = limit;
      }
    }
    for (int32_t g = 0; g * kGroupPositions < block.num_positions; ++g) {
      const int32_t position = at + g * kGroupPositions;
      const int64_t page = pages[position / page_size];
      const int32_t offset = position % page_size;
      const int64_t index = page * op.kv_heads + head;
      block.k[g] = op.keys + index * op.key_page + int64_t{offset} * op.head_dim * element;
      block.v[g] = op.values + index * op.value_page + int64_t{offset} * op.padded_dim * element;
    }
    call.vector->attend(block);
  }
}

// Divides by the sums, writes the heads' outputs and prepares them for the next linear.
void write_output(const AttentionCall& call, const AttentionUnit& unit, int32_t head,
                  const State& total) {
  const AttentionOp& op = *call.op;
  const int32_t columns = op.group * op.head_dim;
  for (int32_t i = 0; i < unit.count; ++i) {
    const int64_t token = unit.first + i;
    float* out = call.out + token * call.out_stride + int64_t{head} * columns;
    for (int32_t g = 0; g < op.group; ++g) {
      const int32_t row = i * op.group + g;
      float* acc = total.acc + int64_t{row} * op.padded_dim;
      call.vector->scale(acc, 1.0f / total.sum[row], op.padded_dim);
      std::memcpy(out + int64_t{g} * op.head_dim, acc, static_cast<size_t>(op.head_dim) * 4);
    }
    for (int32_t kind = 0; kind < 2; ++kind) {
      if (((call.prepare >> kind) & 1u) == 0) {
        continue;
      }
      const ActKind form = form_of(static_cast<ActKind>(kind), call.is_prompt[token] != 0);
      call.matrix->prepare(form, out, call.out_width, head * columns, columns,
                           call.acts[kind] + token * call.act_stride[kind]);
    }
  }
}

void run_unit(const AttentionCall& call, const AttentionScratch& scratch, const AttentionUnit& unit,
              int32_t head) {
  const AttentionOp& op = *call.op;
  const int32_t m = unit.count * op.group;
  const State total = state_at(scratch.state);
  if (unit.segment < 0) {
    const State part = state_at(scratch.part);
    const int32_t last_seen = position_of(call, unit, unit.count - 1) + 1;
    reset(total, m, op.padded_dim);
    for (int32_t segment = 0; segment * kSegment < last_seen; ++segment) {
      run_segment(call, scratch, unit, head, segment, part);
      merge_rows(*call.vector, total, part, m, op.padded_dim);
    }
    write_output(call, unit, head, total);
    return;
  }
  AttentionShared& shared = *call.shared;
  const auto partial = [&](int32_t segment) {
    const int64_t index = int64_t{head} * shared.max_partials + unit.partial + segment;
    return state_at(shared.partials + index * shared.partial_stride);
  };
  run_segment(call, scratch, unit, head, unit.segment, partial(unit.segment));
  // The last to finish merges; acq_rel makes the other workers' partial results visible to it.
  std::atomic<int32_t>& done = shared.done[int64_t{head} * shared.max_splits + unit.done];
  if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < unit.segments) {
    return;
  }
  done.store(0, std::memory_order_relaxed);  // for the next layer, which starts after a barrier
  reset(total, m, op.padded_dim);
  for (int32_t segment = 0; segment < unit.segments; ++segment) {
    merge_rows(*call.vector, total, partial(segment), m, op.padded_dim);
  }
  write_output(call, unit, head, total);
}

void plan_shape(const StepView& view, int32_t num_threads, const AttentionShared& shared,
                AttentionShape& shape) {
  const int32_t per_unit = std::max(1, kQueryRows / shape.group);
  shape.units.clear();
  shape.num_partials = 0;
  shape.num_splits = 0;
  int64_t whole_units = 0;
  for (int32_t row = 0; row < view.num_rows; ++row) {
    const int32_t queries = view.row_start[row + 1] - view.row_start[row];
    whole_units += (queries + per_unit - 1) / per_unit;
  }
  // With a few tasks per worker the load evens out; splitting would only add merges.
  const bool may_split = num_threads > 1 && whole_units * shape.kv_heads < 4 * num_threads;
  for (int32_t row = 0; row < view.num_rows; ++row) {
    const int32_t begin = view.row_start[row];
    const int32_t end = view.row_start[row + 1];
    // Later queries of a prompt see more: they go first so that the short ones fill the gaps.
    const int32_t count = (end - begin + per_unit - 1) / per_unit;
    for (int32_t i = count - 1; i >= 0; --i) {
      AttentionUnit unit;
      unit.row = row;
      unit.first = begin + i * per_unit;
      unit.count = std::min(per_unit, end - unit.first);
      const int32_t seen = view.positions[unit.first + unit.count - 1] + 1;
      const int32_t segments = (seen + kSegment - 1) / kSegment;
      if (!may_split || segments < 2 || shape.num_partials + segments > shared.max_partials ||
          shape.num_splits == shared.max_splits) {
        shape.units.push_back(unit);
        continue;
      }
      unit.segments = segments;
      unit.partial = shape.num_partials;
      unit.done = shape.num_splits++;
      shape.num_partials += segments;
      for (int32_t s = 0; s < segments; ++s) {
        unit.segment = s;
        shape.units.push_back(unit);
      }
    }
  }
}

}  // namespace

void plan_attention(const StepView& view, int32_t num_threads, AttentionShared& shared) {
  for (AttentionShape& shape : shared.shapes) {
    plan_shape(view, num_threads, shared, shape);
  }
}

void fill_ropes(const StepView& view, AttentionShared& shared, int32_t first, int32_t last) {
  for (const RopeTable& rope : shared.ropes) {
    for (int32_t t = first; t < last; ++t) {
      const auto position = static_cast<float>(view.positions[t]);
      float* cosines = rope.cos + int64_t{t} * rope.half;
      float* sines = rope.sin + int64_t{t} * rope.half;
      for (int32_t i = 0; i < rope.half; ++i) {
        // The product in f32, as the reference implementations form it.
        const float angle = position * rope.frequencies[i];
        cosines[i] = std::cos(angle) * rope.multiplier;
        sines[i] = std::sin(angle) * rope.multiplier;
      }
    }
  }
}

void append_kv(const AttentionCall& call, const AttentionScratch& scratch, int32_t worker,
               int32_t num_threads) {
  const AttentionOp& op = *call.op;
  const VectorKernels& vector = *call.vector;
  const RopeTable* rope =
      op.rope_table < 0 ? nullptr : &call.shared->ropes[static_cast<size_t>(op.rope_table)];
  const int32_t num_tokens = call.view->num_tokens;
  const int32_t page_size = call.config->page_size;
  const int32_t kv_type = call.config->kv_type;
  const int64_t element = kv_element(kv_type);
  // Head-major, so that a worker's tokens are neighbours in the key groups it writes.
  const Range mine = split(int64_t{op.kv_heads} * num_tokens, worker, num_threads);
  for (int64_t index = mine.first; index < mine.last; ++index) {
    const int64_t head = index / num_tokens;
    const int64_t t = index % num_tokens;
    const float* cosines = rope == nullptr ? nullptr : rope->cos + t * op.half;
    const float* sines = rope == nullptr ? nullptr : rope->sin + t * op.half;
    for (int32_t g = 0; g < op.group; ++g) {
      const float* q = call.q + t * call.q_stride + (head * op.group + g) * op.head_dim;
      float* to = call.shared->queries + (index * op.group + g) * op.head_dim;
      if (op.q_norm != nullptr) {
        vector.rms_norm(q, op.q_norm, op.head_dim, op.eps, to);
      } else {
        std::memcpy(to, q, static_cast<size_t>(op.head_dim) * 4);
      }
      if (rope != nullptr) {
        vector.rope(to, cosines, sines, op.half, op.neox);
      }
      vector.scale(to, op.scale, op.head_dim);
    }
    const float* k = call.k + t * call.k_stride + head * op.head_dim;
    if (op.k_norm != nullptr) {
      vector.rms_norm(k, op.k_norm, op.head_dim, op.eps, scratch.head);
    } else {
      std::memcpy(scratch.head, k, static_cast<size_t>(op.head_dim) * 4);
    }
    if (rope != nullptr) {
      vector.rope(scratch.head, cosines, sines, op.half, op.neox);
    }
    const int64_t slot = call.view->kv_slot[t];
    const int64_t place = slot / page_size * op.kv_heads + head;
    const int64_t offset = slot % page_size;
    const int64_t group = offset / kGroupPositions * kGroupPositions;
    vector.store_k(kv_type, scratch.head, op.head_dim, static_cast<int32_t>(offset - group),
                   op.keys + place * op.key_page + group * op.head_dim * element);
    vector.store_v(kv_type, call.v + t * call.v_stride + head * op.head_dim, op.head_dim,
                   op.padded_dim,
                   op.values + place * op.value_page + offset * op.padded_dim * element);
  }
}

void attend(const AttentionCall& call, const AttentionScratch& scratch, int32_t num_threads) {
  const AttentionOp& op = *call.op;
  const AttentionShape& shape = call.shared->shapes[static_cast<size_t>(op.shape)];
  const auto count = static_cast<int64_t>(shape.units.size());
  const int64_t tasks = count * op.kv_heads;
  while (true) {
    const int64_t task = num_threads == 1 ? call.tail->next++
                                          : call.tail->next.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks) {
      return;
    }
    run_unit(call, scratch, shape.units[static_cast<size_t>(task / op.kv_heads)],
             static_cast<int32_t>(task % op.kv_heads));
  }
}

}  // namespace kt
