#include "model/executor.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/error.h"

namespace kt {
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void Executor::run() {
  const int64_t start = now_ns();
  m_.workers_.run([](void* self, int32_t worker) { static_cast<Executor*>(self)->work(worker); },
                  this);
  m_.run_ns_ += now_ns() - start;
  ++m_.num_runs_;
}

void Executor::work(int32_t worker) {
  const Range tokens = split(m_.view_.num_tokens, worker, m_.workers_.num_threads());
  fill_ropes(m_.view_, m_.attention_, static_cast<int32_t>(tokens.first),
             static_cast<int32_t>(tokens.last));
  // Every first step but attention has a barrier between here and the first use of the tables.
  if (m_.steps_.front().code == KT_OP_ATTENTION) {
    m_.workers_.barrier();
  }
  int64_t before = worker == 0 ? now_ns() : 0;
  for (const Step& s : m_.steps_) {
    step(s, worker);
    if (worker != 0) {
      continue;
    }
    const int64_t now = now_ns();
    m_.class_ns_[s.time_class] += now - before;
    before = now;
  }
  m_.sampler_->run(worker);
  if (worker == 0) {
    m_.sample_ns_ += now_ns() - before;
  }
}

void Executor::step(const Step& s, int32_t worker) {
  if (s.code == kStepPrepare) {
    return prepare_buffer(s, worker);
  }
  const kt_op& op = m_.ops_[static_cast<size_t>(s.first)];
  // Nothing reads the logits of a step without logit rows.
  if (rows_of(buffer(op.out[0])) == 0) {
    return;
  }
  switch (op.code) {
    case KT_OP_EMBED:
      return embed(s, op, worker);
    case KT_OP_RMSNORM:
      return norm(s, op, worker);
    case KT_OP_LINEAR:
      return linear(s, worker);
    case KT_OP_ATTENTION:
      return attention(s, op, worker);
    case KT_OP_MOE:
      return experts(s, op, worker);
    case KT_OP_GATHER:
      return gather(s, op, worker);
    default:
      return elementwise(s, op, worker);
  }
}

template <class Body>
void Executor::for_pieces(int64_t rows, int32_t width, int32_t worker, Body&& body) {
  const int64_t chunks = (width + kColumnChunk - 1) / kColumnChunk;
  const Range mine = split(rows * chunks, worker, m_.workers_.num_threads());
  for (int64_t piece = mine.first; piece < mine.last; ++piece) {
    const auto first = static_cast<int32_t>(piece % chunks) * kColumnChunk;
    body(piece / chunks, first, std::min(kColumnChunk, width - first));
  }
}

void Executor::prepare_row(const Buffer& b, uint32_t forms, int64_t row, int32_t first,
                           int32_t count) {
  for (int32_t kind = 0; kind < kNumActKinds; ++kind) {
    if (((forms >> kind) & 1u) == 0) {
      continue;
    }
    m_.matrix_->prepare(form_of(static_cast<ActKind>(kind), is_prompt(b, row)),
                        b.data + row * b.stride + first, b.width, first, count,
                        b.acts[kind] + row * b.act_stride[kind]);
  }
}

void Executor::embed(const Step& s, const kt_op& op, int32_t worker) {
  const Buffer& out = buffer(op.out[0]);
  const Weight& table = weight(op.w[0]);
  const TypeTraits& type = *type_traits(table.type);
  for_pieces(m_.view_.num_tokens, out.width, worker, [&](int64_t t, int32_t first, int32_t count) {
    // kColumnChunk is a multiple of every block size.
    const uint8_t* row = table.borrowed + m_.tokens_[static_cast<size_t>(t)] * table.row_bytes +
                         int64_t{first} / type.block_size * type.block_bytes;
    dequantize_row(table.type, row, count, out.data + t * out.stride + first);
    prepare_row(out, s.prepare, t, first, count);
  });
  m_.workers_.barrier();
}

void Executor::norm(const Step& s, const kt_op& op, int32_t worker) {
  const Buffer& out = buffer(op.out[0]);
  if (is_private(s, out)) {
    return private_norm(s, op, worker);
  }
  const Buffer& in = buffer(op.in[0]);
  const int32_t group = op.i[0] == 0 ? in.width : op.i[0];
  const Range rows = split(rows_of(out), worker, m_.workers_.num_threads());
  for (int64_t row = rows.first; row < rows.last; ++row) {
    for (int32_t c = 0; c < in.width; c += group) {
      m_.vector_->rms_norm(in.data + row * in.stride + c, weight(op.w[0]).values, group, op.f[0],
                           out.data + row * out.stride + c);
    }
    prepare_row(out, s.prepare, row, 0, out.width);
  }
  m_.workers_.barrier();
}

// The same values in this worker's own memory; no barrier, because nobody else reads them.
void Executor::private_norm(const Step& s, const kt_op& op, int32_t worker) {
  const Buffer& in = buffer(op.in[0]);
  const Buffer& out = buffer(op.out[0]);
  WorkerScratch& mine = scratch(worker);
  const int32_t group = op.i[0] == 0 ? in.width : op.i[0];
  for (int64_t row = 0; row < rows_of(out); ++row) {
    float* to = mine.row + row * out.stride;
    for (int32_t c = 0; c < in.width; c += group) {
      m_.vector_->rms_norm(in.data + row * in.stride + c, weight(op.w[0]).values, group, op.f[0],
                           to + c);
    }
    for (int32_t kind = 0; kind < kNumActKinds; ++kind) {
      if (((s.prepare >> kind) & 1u) == 0) {
        continue;
      }
      m_.matrix_->prepare(form_of(static_cast<ActKind>(kind), is_prompt(out, row)), to, out.width,
                          0, out.width, mine.acts[kind] + row * out.act_stride[kind]);
    }
    if (worker == 0) {  // for kt_model_read
      std::memcpy(out.data + row * out.stride, to, static_cast<size_t>(out.width) * 4);
    }
  }
}

void Executor::elementwise(const Step& s, const kt_op& op, int32_t worker) {
  const Buffer& out = buffer(op.out[0]);
  const Buffer& a = buffer(op.in[0]);
  const Buffer& b = buffer(op.in[1]);
  for_pieces(rows_of(out), out.width, worker, [&](int64_t row, int32_t first, int32_t count) {
    float* to = out.data + row * out.stride + first;
    const float* x = a.data + row * a.stride + first;
    if (op.code == KT_OP_SILU_MUL) {
      m_.vector_->silu_mul(x, b.data + row * b.stride + first, count, to);
    } else if (op.code == KT_OP_ADD) {
      m_.vector_->add_scaled(x, 1.0f, b.data + row * b.stride + first, count, to);
    } else {
      const Buffer& c = buffer(op.in[2]);
      const float scale = 1.0f / (1.0f + __builtin_expf(-b.data[row * b.stride]));
      m_.vector_->add_scaled(x, scale, c.data + row * c.stride + first, count, to);
    }
    prepare_row(out, s.prepare, row, first, count);
  });
  m_.workers_.barrier();
}

void Executor::gather(const Step& s, const kt_op& op, int32_t worker) {
  const Buffer& in = buffer(op.in[0]);
  const Buffer& out = buffer(op.out[0]);
  for_pieces(rows_of(out), out.width, worker, [&](int64_t row, int32_t first, int32_t count) {
    const int64_t from = m_.view_.samples[row].token_index;
    std::memcpy(out.data + row * out.stride + first, in.data + from * in.stride + first,
                static_cast<size_t>(count) * 4);
    prepare_row(out, s.prepare, row, first, count);
  });
  m_.workers_.barrier();
}

void Executor::prepare_buffer(const Step& s, int32_t worker) {
  const Buffer& b = buffer(s.buffer);
  if (rows_of(b) == 0) {
    return;
  }
  for_pieces(rows_of(b), b.width, worker, [&](int64_t row, int32_t first, int32_t count) {
    prepare_row(b, s.prepare, row, first, count);
  });
  m_.workers_.barrier();
}

// A group of linears is one axis of bytes: op after op, band after band; and that again for every
// kLinearRows rows of the runs, so that a worker's piece belongs to few rows, which stay in its L2
// cache.
void Executor::linear(const Step& s, int32_t worker) {
  const size_t parts = weight(m_.ops_[static_cast<size_t>(s.first)].w[0]).parts.size();
  const size_t p = part_of_worker(m_.workers_, parts, worker);
  const Range team = part_workers(m_.workers_, parts, p);
  // Prompt rows take bands in pairs, so the cuts fall between pairs.
  const bool in_pairs = std::any_of(m_.runs_.begin(), m_.runs_.end(),
                                    [](const TokenRun& run) { return run.is_prompt; });
  const int64_t step = in_pairs ? 2 : 1;
  int64_t total = 0;
  int64_t largest = kPieceBytes;
  for (int32_t i = s.first; i < s.first + s.count; ++i) {
    const Matrix& w = weight(m_.ops_[static_cast<size_t>(i)].w[0]).parts[p].matrix;
    total += w.num_bands * w.band_bytes;
    largest = std::max(largest, step * w.band_bytes);
  }
  // Pieces [lo, hi) of the axis for one block of rows.
  const auto run_block = [&](int64_t lo, int64_t hi, int32_t block) {
    int64_t start = 0;
    for (int32_t i = s.first; i < s.first + s.count && start < hi; ++i) {
      const kt_op& op = m_.ops_[static_cast<size_t>(i)];
      const Matrix& w = weight(op.w[0]).parts[p].matrix;
      // A band belongs to the piece in which it begins.
      const auto index = [&](int64_t at) {
        const int64_t bytes = step * w.band_bytes;
        const int64_t band = (at - start + bytes - 1) / bytes * step;
        return static_cast<int32_t>(std::clamp<int64_t>(band, 0, w.num_bands));
      };
      const int32_t first = lo <= start ? 0 : index(lo);
      const int32_t last = index(hi);
      if (first < last) {
        linear_bands(s, op, p, first, last, block, worker);
      }
      start += w.num_bands * w.band_bytes;
    }
  };
  int32_t most = rows_by_sample(s);
  for (const TokenRun& run : m_.runs_) {
    most = std::max(most, run.count);
  }
  const int64_t blocks = std::max(1, (most + kLinearRows - 1) / kLinearRows);
  share_range(total * blocks, 1, worker - team.first, team.last - team.first, largest,
              m_.tails_[static_cast<size_t>(s.tails) + p], [&](int64_t lo, int64_t hi) {
                for (int64_t block = lo / total; block * total < hi; ++block) {
                  run_block(std::max<int64_t>(0, lo - block * total),
                            std::min(total, hi - block * total), static_cast<int32_t>(block));
                }
              });
  m_.workers_.barrier();
}

// Rows of the group's results that have one for every sample, 0 when there are none.
int32_t Executor::rows_by_sample(const Step& s) {
  int32_t most = 0;
  for (int32_t i = s.first; i < s.first + s.count; ++i) {
    const Buffer& out = buffer(m_.ops_[static_cast<size_t>(i)].out[0]);
    most = out.by_sample ? std::max(most, rows_of(out)) : most;
  }
  return most;
}

// Logit rows count as generated tokens: their number is small, their precision is what one sees.
void Executor::linear_bands(const Step& s, const kt_op& op, size_t p, int32_t first, int32_t last,
                            int32_t block, int32_t worker) {
  const Buffer& out = buffer(op.out[0]);
  const auto run_block = [&](const TokenRun& run) {
    const int32_t skipped = block * kLinearRows;
    if (skipped < run.count) {
      const int32_t count = std::min(kLinearRows, run.count - skipped);
      linear_run(s, op, p, first, last, worker, {run.first + skipped, count, run.is_prompt});
    }
  };
  if (out.by_sample) {
    run_block({0, rows_of(out), false});
    return;
  }
  for (const TokenRun& run : m_.runs_) {
    run_block(run);
  }
}

// At most kLinearRows rows.
void Executor::linear_run(const Step& s, const kt_op& op, size_t p, int32_t first, int32_t last,
                          int32_t worker, const TokenRun& run) {
  const Weight& w = weight(op.w[0]);
  const WeightPart& part = w.parts[p];
  const Buffer& in = buffer(op.in[0]);
  const Buffer& out = buffer(op.out[0]);
  const int64_t stride = in.act_stride[w.act];
  const uint8_t* x = act_row(s, in, w.act, worker) + run.first * stride;
  WorkerScratch& mine = scratch(worker);
  const bool in_place = op.in[1] < 0 && op.w[1] < 0;
  const bool in_tiles = run.is_prompt && w.act == kActQ8;
  const int32_t step = in_tiles ? kPromptBands : 1;
  for (int32_t band = first; band < last; band += step) {
    const int32_t bands = std::min(step, last - band);
    const int32_t column = (part.first_band + band) * kBandRows;
    const int32_t columns = std::min(bands * kBandRows, w.rows - column);
    const bool direct = in_place && columns == bands * kBandRows;
    float* to = out.data + int64_t{run.first} * out.stride + column;
    float* sums = direct ? to : mine.temp;
    const int64_t sums_stride = direct ? out.stride : bands * kBandRows;
    const int32_t then = band + bands;
    const uint8_t* next = then < last ? band_at(part.matrix, 0, then) : nullptr;
    if (in_tiles) {
      const PromptRows rows = {.acts = x, .row_stride = stride, .m = run.count};
      m_.matrix_->multiply_prompt(part.matrix, 0, band, bands, rows, sums, sums_stride,
                                  mine.multiply, next);
    } else {
      m_.matrix_->multiply_band(part.matrix, 0, band, x, stride, nullptr, run.count, sums,
                                sums_stride, mine.multiply, next);
    }
    if (!direct) {
      finish_linear(op, run.first, run.count, column, columns, sums, sums_stride);
    }
  }
}

// Sums of rows [row, row + m) and some columns, plus bias and residual, to the output.
void Executor::finish_linear(const kt_op& op, int32_t row, int32_t m, int32_t column,
                             int32_t columns, float* sums, int64_t sums_stride) {
  const Buffer& out = buffer(op.out[0]);
  const Buffer* residual = op.in[1] < 0 ? nullptr : &buffer(op.in[1]);
  const float* bias = op.w[1] < 0 ? nullptr : weight(op.w[1]).values;
  for (int64_t i = row; i < row + m; ++i, sums += sums_stride) {
    float* to = out.data + i * out.stride + column;
    if (bias != nullptr) {
      m_.vector_->add_scaled(sums, 1.0f, bias + column, columns, sums);
    }
    if (residual != nullptr) {
      const float* add = residual->data + i * residual->stride + column;
      m_.vector_->add_scaled(sums, 1.0f, add, columns, to);
    } else {
      std::memcpy(to, sums, static_cast<size_t>(columns) * 4);
    }
  }
}

void Executor::attention(const Step& s, const kt_op& op, int32_t worker) {
  const Buffer& out = buffer(op.out[0]);
  AttentionCall call;
  call.op = &m_.attentions_[static_cast<size_t>(m_.op_extra_[static_cast<size_t>(s.first)])];
  call.view = &m_.view_;
  call.config = &m_.config_;
  call.vector = m_.vector_;
  call.matrix = m_.matrix_;
  call.shared = &m_.attention_;
  call.q = buffer(op.in[0]).data;
  call.k = buffer(op.in[1]).data;
  call.v = buffer(op.in[2]).data;
  call.q_stride = buffer(op.in[0]).stride;
  call.k_stride = buffer(op.in[1]).stride;
  call.v_stride = buffer(op.in[2]).stride;
  call.out = out.data;
  call.out_stride = out.stride;
  call.out_width = out.width;
  call.prepare = s.prepare;
  call.is_prompt = m_.is_prompt_.data();
  for (int32_t kind = 0; kind < kNumActKinds; ++kind) {
    call.acts[kind] = out.acts[kind];
    call.act_stride[kind] = out.act_stride[kind];
  }
  call.tail = &m_.tails_[s.tails];
  const AttentionScratch& mine = scratch(worker).attention;
  append_kv(call, mine, worker, m_.workers_.num_threads());
  m_.workers_.barrier();
  attend(call, mine, m_.workers_.num_threads());
  m_.workers_.barrier();
}

// Router logits [T, E], shared over workers by blocks of tokens and experts.
void Executor::route(const Step& s, const kt_op& op, const MoeOp& moe, int32_t worker) {
  constexpr int32_t kTokens = 16;
  constexpr int32_t kExperts = 4;
  const Buffer& in = buffer(op.in[0]);
  const float* x = is_private(s, in) ? scratch(worker).row : in.data;
  const int32_t num_experts = moe.routing.num_experts;
  const int32_t num_tokens = rows_of(in);
  const int64_t token_blocks = (num_tokens + kTokens - 1) / kTokens;
  const int64_t expert_blocks = (num_experts + kExperts - 1) / kExperts;
  const Range mine = split(token_blocks * expert_blocks, worker, m_.workers_.num_threads());
  for (int64_t block = mine.first; block < mine.last; ++block) {
    const auto t = static_cast<int32_t>(block / expert_blocks) * kTokens;
    const auto e = static_cast<int32_t>(block % expert_blocks) * kExperts;
    m_.vector_->dot_rows(moe.router + int64_t{e} * in.width, in.width,
                         std::min(kExperts, num_experts - e), x + int64_t{t} * in.stride, in.stride,
                         std::min(kTokens, num_tokens - t), in.width,
                         m_.router_logits_ + int64_t{t} * num_experts + e, num_experts);
  }
}

void Executor::select(const MoeOp& moe, int32_t token, WorkerScratch& mine, int32_t* ids,
                      float* weights) {
  const int32_t count = moe.routing.num_experts;
  float* scores = mine.choice;
  std::memcpy(scores, m_.router_logits_ + int64_t{token} * count, static_cast<size_t>(count) * 4);
  if (moe.routing.sigmoid != 0) {
    for (int32_t e = 0; e < count; ++e) {
      scores[e] = 1.0f / (1.0f + __builtin_expf(-scores[e]));
    }
  } else {
    m_.vector_->softmax(scores, count);
  }
  select_experts(moe.routing, scores, scores + count, ids, weights);
}

ExpertJob Executor::expert_job(const Step& s, const kt_op& op, const MoeOp& moe, int32_t worker) {
  const Buffer& in = buffer(op.in[0]);
  const Buffer& out = buffer(op.out[0]);
  const ActKind kind = moe.weights.gate->act;
  ExpertJob job;
  job.weights = moe.weights;
  job.x = act_row(s, in, kind, worker);
  job.x_stride = in.act_stride[kind];
  if (op.in[1] >= 0) {
    job.residual = buffer(op.in[1]).data;
    job.residual_stride = buffer(op.in[1]).stride;
  }
  job.out = out.data;
  job.out_stride = out.stride;
  job.num_tokens = rows_of(out);
  job.is_prompt = in.by_sample ? nullptr : m_.is_prompt_.data();
  job.matrix = m_.matrix_;
  job.vector = m_.vector_;
  job.tails = m_.tails_ + s.tails;
  return job;
}

void Executor::experts(const Step& s, const kt_op& op, int32_t worker) {
  const MoeOp& moe = m_.moes_[static_cast<size_t>(m_.op_extra_[static_cast<size_t>(s.first)])];
  const int32_t top_k = moe.routing.top_k;
  const int32_t num_tokens = rows_of(buffer(op.out[0]));
  WorkerScratch& mine = scratch(worker);
  route(s, op, moe, worker);
  m_.workers_.barrier();
  const int32_t* ids = m_.expert_ids_;
  const float* weights = m_.expert_weights_;
  if (num_tokens <= kPrivateRows) {
    for (int32_t t = 0; t < num_tokens; ++t) {
      select(moe, t, mine, mine.ids + t * top_k, mine.weights + t * top_k);
    }
    ids = mine.ids;
    weights = mine.weights;
  } else {
    const Range tokens = split(num_tokens, worker, m_.workers_.num_threads());
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
      select(moe, static_cast<int32_t>(t), mine, m_.expert_ids_ + t * top_k,
             m_.expert_weights_ + t * top_k);
    }
    m_.workers_.barrier();
  }
  const ExpertJob job = expert_job(s, op, moe, worker);
  group_pairs(ids, weights, num_tokens, top_k, moe.routing.num_experts, job.is_prompt,
              m_.experts_.groupings[static_cast<size_t>(worker)]);
  run_up(m_.workers_, job, m_.experts_, worker);
  m_.workers_.barrier();
  run_down(m_.workers_, job, m_.experts_, worker);
  m_.workers_.barrier();
}

}  // namespace kt
