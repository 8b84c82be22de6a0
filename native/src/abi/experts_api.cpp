// kt_experts_multiply: one routed-expert layer without a model, for tests and benchmarks. The work
// area belongs to the pool and is kept, so that a timed call allocates nothing.
#include <algorithm>
#include <memory>
#include <mutex>
#include <string>

#include "abi/matrix_handle.h"
#include "base/arena.h"
#include "base/error.h"
#include "experts/experts.h"
#include "host/workers.h"
#include "kt.h"

namespace kt {
namespace {

constexpr int32_t kChunk = 256;  // columns prepared together; a multiple of 32

struct Workspace {
  Arena arena;
  ExpertBuffers buffers;
  uint8_t* x = nullptr;
  TailCounter* tails = nullptr;
  int64_t x_bytes = 0;
  int64_t mid_row_bytes = 0;
  int32_t max_cols = 0;
  int32_t max_rows = 0;
};

Weight as_weight(const Matrix& matrix) {
  Weight weight;
  weight.type = matrix.type;
  weight.num_experts = matrix.num_experts;
  weight.rows = matrix.rows;
  weight.cols = matrix.cols;
  weight.act = matrix.act;
  weight.parts.push_back({matrix, 0});
  return weight;
}

// The pool's work area, replaced when it is too small.
Workspace& workspace_for(kt_pool& pool, int64_t pairs, int32_t experts, int64_t x_bytes,
                         int64_t mid_row_bytes, int32_t max_cols, int32_t max_rows) {
  auto* known = static_cast<Workspace*>(pool.expert_memory.get());
  if (known != nullptr && pairs <= known->buffers.max_pairs &&
      experts <= known->buffers.max_experts && x_bytes <= known->x_bytes &&
      mid_row_bytes <= known->mid_row_bytes && max_cols <= known->max_cols &&
      max_rows <= known->max_rows) {
    return *known;
  }
  auto fresh = std::make_shared<Workspace>();
  allocate_expert_buffers(pool.workers, fresh->arena, pairs, experts, mid_row_bytes, max_cols,
                          max_rows, fresh->buffers);
  fresh->x = fresh->arena.allocate(x_bytes);
  fresh->tails = fresh->arena.allocate_array<TailCounter>(2);
  fresh->x_bytes = x_bytes;
  fresh->mid_row_bytes = mid_row_bytes;
  fresh->max_cols = max_cols;
  fresh->max_rows = max_rows;
  pool.expert_memory = fresh;
  return *fresh;
}

void check_ids(const int32_t* ids, int64_t pairs, int32_t num_experts) {
  for (int64_t i = 0; i < pairs; ++i) {
    if (ids[i] < 0 || ids[i] >= num_experts) {
      fail_argument("ids[" + std::to_string(i) + "] is " + std::to_string(ids[i]) +
                    ", allowed is 0 .. " + std::to_string(num_experts - 1));
    }
  }
}

void multiply(kt_pool& pool, const ExpertWeights& weights, const float* x, const int32_t* ids,
              const float* factors, int32_t num_tokens, int32_t top_k, float* out,
              const uint8_t* is_prompt) {
  Workers& workers = pool.workers;
  const int32_t cols = weights.gate->cols;
  const ActKind kind = weights.gate->act;
  const int64_t stride = act_row_bytes(kind, cols);
  const std::lock_guard<std::mutex> lock(pool.expert_lock);
  Workspace& space =
      workspace_for(pool, int64_t{num_tokens} * top_k, weights.gate->num_experts,
                    stride * num_tokens, act_row_bytes(weights.down->act, weights.down->cols),
                    std::max(cols, weights.down->cols), weights.down->rows);
  ExpertJob job;
  job.weights = weights;
  job.x = space.x;
  job.x_stride = stride;
  job.out = out;
  job.out_stride = weights.down->rows;
  job.num_tokens = num_tokens;
  job.matrix = matrix_kernels(workers.isa());
  job.vector = vector_kernels(workers.isa());
  job.tails = space.tails;
  if (job.matrix == nullptr || job.vector == nullptr) {
    fail_unsupported("no kernels for this isa");
  }
  job.is_prompt = prompt_flags(*job.matrix, is_prompt);
  for (int i = 0; i < 2; ++i) {
    space.tails[i].next.store(0);
  }
  workers.for_each([&](int32_t worker) {
    group_pairs(ids, factors, num_tokens, top_k, weights.gate->num_experts, job.is_prompt,
                space.buffers.groupings[static_cast<size_t>(worker)]);
    fetch_up(workers, job, space.buffers, worker);
    const int64_t chunks = (cols + kChunk - 1) / kChunk;
    const Range pieces = split(num_tokens * chunks, worker, workers.num_threads());
    for (int64_t piece = pieces.first; piece < pieces.last; ++piece) {
      const int64_t t = piece / chunks;
      const auto first = static_cast<int32_t>(piece % chunks) * kChunk;
      const bool prompt = job.is_prompt != nullptr && job.is_prompt[t] != 0;
      job.matrix->prepare(form_of(kind, prompt), x + t * cols + first, cols, first,
                          std::min(kChunk, cols - first), space.x + t * stride);
    }
    workers.barrier();
    run_up(workers, job, space.buffers, worker);
    workers.barrier();
    run_down(workers, job, space.buffers, worker);
  });
}

}  // namespace
}  // namespace kt

extern "C" int32_t kt_experts_multiply(const kt_matrix* gate, const kt_matrix* up,
                                       const kt_matrix* down, const float* x, const int32_t* ids,
                                       const float* weights, int32_t num_tokens, int32_t top_k,
                                       float* out, const uint8_t* is_prompt) {
  return kt::guard([&] {
    kt::require_handle(gate, "gate");
    kt::require_handle(up, "up");
    kt::require_handle(down, "down");
    kt::require_handle(gate->pool, "the gate matrix's pool");
    if (gate->pool != up->pool || gate->pool != down->pool) {
      kt::fail_argument("gate, up and down belong to different pools");
    }
    if (num_tokens < 0) {
      kt::fail_argument("num_tokens is " + std::to_string(num_tokens));
    }
    const kt::Weight parts[3] = {kt::as_weight(gate->view), kt::as_weight(up->view),
                                 kt::as_weight(down->view)};
    const kt::ExpertWeights experts = {&parts[0], &parts[1], &parts[2]};
    kt::check_expert_weights(experts, "kt_experts_multiply");
    if (top_k < 1 || top_k > parts[0].num_experts) {
      kt::fail_argument("top_k is " + std::to_string(top_k) + ", allowed is 1 .. " +
                        std::to_string(parts[0].num_experts));
    }
    if (num_tokens == 0) {
      return KT_OK;
    }
    if (int64_t{num_tokens} * top_k > INT32_MAX) {
      kt::fail_argument("num_tokens x top_k is " + std::to_string(int64_t{num_tokens} * top_k) +
                        ", at most 2147483647");
    }
    kt::require_handle(x, "x");
    kt::require_handle(ids, "ids");
    kt::require_handle(weights, "weights");
    kt::require_handle(out, "out");
    kt::check_ids(ids, int64_t{num_tokens} * top_k, parts[0].num_experts);
    kt::multiply(*gate->pool, experts, x, ids, weights, num_tokens, top_k, out, is_prompt);
    return KT_OK;
  });
}
