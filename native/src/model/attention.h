// Paged causal grouped-query attention with a private KV layout.
//
// DESIGN
//  KV of one layer: for each page and KV head, keys in groups of 16 positions, [D][16], and values
//  [page_size][Dp] (Dp = D rounded up to 16). One key load then serves 16 positions and all query
//  heads of the group.
//  Order of additions: positions are cut into blocks of 64 and segments of kSegment positions, both
//  aligned to absolute positions of the row. A segment is one online softmax over its blocks; the
//  segments of a token are merged in order. Nothing else enters, so a token's result has the same
//  bits whether it is computed alone, in a batch, in a whole prompt or in chunks, by one worker or
//  split over many.
//  Work: a task is (unit, KV head); a unit is a run of queries of one row, whole, or, when a long
//  context would leave workers idle, one segment of it. The worker that finishes the last segment
//  of a split unit merges them all.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "experts/tasks.h"
#include "kernels/kernels.h"
#include "kernels/vector.h"
#include "kt.h"
#include "model/step_view.h"

namespace kt {

inline constexpr int32_t kSegment = 256;
// Query rows (queries x heads of the group) that share one pass over the keys.
inline constexpr int32_t kQueryRows = 32;

struct AttentionOp {
  int32_t layer = 0;
  int32_t q_heads = 0;
  int32_t kv_heads = 0;
  int32_t group = 0;  // q_heads / kv_heads
  int32_t head_dim = 0;
  int32_t padded_dim = 0;
  int32_t half = 0;  // rotated pairs
  int32_t neox = 1;
  float eps = 0;
  float scale = 1;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  int32_t rope_table = -1;    // index into AttentionShared::ropes
  int32_t shape = -1;         // index into AttentionShared::shapes
  uint8_t* keys = nullptr;    // [num_pages][kv_heads][page_size / 16][D][16]
  uint8_t* values = nullptr;  // [num_pages][kv_heads][page_size][Dp]
  int64_t key_page = 0;       // bytes of one page and head
  int64_t value_page = 0;
};

// cos and sin of the step's positions; shared by all layers with the same frequencies.
struct RopeTable {
  const float* frequencies = nullptr;  // [half]
  int32_t half = 0;
  float multiplier = 1;
  float* cos = nullptr;  // [max_tokens, half]
  float* sin = nullptr;
};

struct AttentionUnit {
  int32_t row = 0;
  int32_t first = 0;     // token index of the first query
  int32_t count = 0;     // queries
  int32_t segment = -1;  // -1 = all segments
  int32_t segments = 0;  // of a split unit
  int32_t partial = 0;   // first partial result of a split unit and head 0
  int32_t done = 0;      // its countdown
};

// Units of a step for one (group size, KV heads); layers of equal shape share it.
struct AttentionShape {
  int32_t group = 0;
  int32_t kv_heads = 0;
  std::vector<AttentionUnit> units;
  int32_t num_partials = 0;
  int32_t num_splits = 0;
};

struct AttentionShared {
  std::vector<RopeTable> ropes;
  std::vector<AttentionShape> shapes;
  float* queries = nullptr;    // [max_tokens, QH * D] normed, rotated, scaled, head-major groups
  float* partials = nullptr;   // results of single segments
  int64_t partial_stride = 0;  // floats: max, sum [kQueryRows] each, acc [kQueryRows, Dp]
  int32_t max_partials = 0;    // per KV head
  std::atomic<int32_t>* done = nullptr;  // countdown per (split unit, head)
  int32_t max_splits = 0;
};

struct AttentionScratch {   // per worker
  float* state = nullptr;   // total: max, sum, acc
  float* part = nullptr;    // current segment: max, sum, acc
  float* scores = nullptr;  // [kQueryRows, 64]
  float* head = nullptr;    // one head
  int32_t* limits = nullptr;
};

struct AttentionCall {
  const AttentionOp* op = nullptr;
  const StepView* view = nullptr;
  const kt_model_config* config = nullptr;
  const VectorKernels* vector = nullptr;
  const MatrixKernels* matrix = nullptr;
  AttentionShared* shared = nullptr;
  const float* q = nullptr;  // buffers and their strides
  const float* k = nullptr;
  const float* v = nullptr;
  float* out = nullptr;
  int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0;
  int32_t out_width = 0;
  uint32_t prepare = 0;                // bit ActKind
  const uint8_t* is_prompt = nullptr;  // [T]
  uint8_t* acts[2] = {nullptr, nullptr};
  int64_t act_stride[2] = {0, 0};
  TailCounter* tail = nullptr;
};

// Once per step, by the caller's thread, before the job: units of every shape.
void plan_attention(const StepView& view, int32_t num_threads, AttentionShared& shared);
// Tokens [first, last) of every rope table.
void fill_ropes(const StepView& view, AttentionShared& shared, int32_t first, int32_t last);
// Norms and rotates q and k and appends k and v; pieces of tokens x KV heads. Barrier after it.
void append_kv(const AttentionCall& call, const AttentionScratch& scratch, int32_t worker,
               int32_t num_threads);
// Attends. Barrier after it.
void attend(const AttentionCall& call, const AttentionScratch& scratch, int32_t num_threads);

// Floats of one partial result.
inline int64_t partial_floats(int32_t padded_dim) { return int64_t{kQueryRows} * (2 + padded_dim); }

}  // namespace kt
