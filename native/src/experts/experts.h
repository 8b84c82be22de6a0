// One routed-expert layer: two phases over the union of the experts that the step's tokens use.
//
// DESIGN
//  Grouping: every worker sorts the (token, expert) pairs by expert for itself; that costs less
//  than a barrier. Pair p of the sorted order owns row p of the intermediate activations. Phase 1
//  (run_up): a task is 32 intermediate rows of one expert (two bands of gate, two of up) for all
//  its tokens: silu(gate) * up is prepared in place, because 32 columns are one block of the
//  prepared form. Barrier. Phase 2 (run_down): a task is one band of output rows. Its owner walks
//  the experts in id order and adds weight * down to the output, so a token's result never depends
//  on the other tokens of the step, and nothing is added atomically. The last bands of a decode
//  step are cut into segments of some experts, whose products are kept until all are there and then
//  added in the same order.
//  Prompt tokens: an expert's pairs of prompt tokens come before its other pairs. Where the kernels
//  have multiply_prompt, they are multiplied by it, from rows copied next to each other, line by
//  line (PromptRows with row_stride 64); their intermediate rows lie in the same way, in the place
//  of the expert's first pairs. In phase 2 they are too many to be read by every worker, from the
//  caches of those that made them: a team of workers has a range of bands; they take experts as
//  they come and add the products in turn, in id order.
#pragma once

#include <cstdint>

#include "base/arena.h"
#include "experts/tasks.h"
#include "kernels/kernels.h"
#include "kernels/vector.h"
#include "model/weights.h"

namespace kt {

// Rows handled per kernel call: bounds the temporaries; the band is then still in L1/L2.
inline constexpr int32_t kRowBlock = 64;
inline constexpr int32_t kUnitRows = 2 * kBandRows;
inline constexpr int32_t kPromptUnits = kPromptBands / 2;
// Most pairs of a step whose last down bands are cut into segments.
inline constexpr int64_t kKeptPairs = 1024;
// Prepared prompt rows that are copied together at a time, and sums of many tokens: half of a
// core's L2 cache.
inline constexpr int64_t kGatherBytes = 1 << 20;
inline constexpr int64_t kTurnWorkers = 4;     // of a team that adds its products in turn
inline constexpr int32_t kCompactTokens = 32;  // from so many on, sums are kept together

struct ExpertWeights {
  const Weight* gate = nullptr;
  const Weight* up = nullptr;
  const Weight* down = nullptr;
};

// Throws when the three matrices do not fit together.
void check_expert_weights(const ExpertWeights& weights, const char* op);

// Sorted pairs, private to one worker.
struct Grouping {
  int32_t* start = nullptr;   // [E + 1] pairs of expert e: start[e] .. start[e + 1]
  int32_t* prompt = nullptr;  // [E] how many of them, the first ones, belong to prompt tokens
  int32_t* tokens = nullptr;  // [T * K]
  float* weights = nullptr;   // [T * K]
  int32_t* active = nullptr;  // [E] experts with pairs, ascending
  int32_t num_active = 0;
};

// Memory of a layer, shared by all layers of a model; sized for the largest.
struct ExpertBuffers {
  int64_t max_pairs = 0;
  int32_t max_experts = 0;
  uint8_t* mid = nullptr;           // prepared intermediate rows [max_pairs]
  int64_t kept_pairs = 0;           // most pairs of a step whose bands are cut into segments
  float* kept = nullptr;            // [bands of down, kept_pairs, 16] sums of those bands
  TailCounter* arrived = nullptr;   // [bands of down] segments that are there; 0 between layers
  std::vector<Grouping> groupings;  // per worker
  std::vector<float*> temps;        // per worker: 2 * kPromptRows * kPromptUnits * kUnitRows
  std::vector<uint8_t*> rows;     // per worker: prompt rows of one expert, then sums; kGatherBytes
  std::vector<uint8_t*> scratch;  // per worker: multiply_scratch_bytes
};

void allocate_expert_buffers(Workers& workers, Arena& arena, int64_t max_pairs, int32_t max_experts,
                             int64_t mid_row_bytes, int32_t max_cols, int32_t max_rows,
                             ExpertBuffers& buffers);

struct ExpertJob {
  ExpertWeights weights;
  const uint8_t* x = nullptr;  // prepared rows [T]
  int64_t x_stride = 0;
  const float* residual = nullptr;  // [T, H] or nullptr = 0; may be out
  int64_t residual_stride = 0;
  float* out = nullptr;  // [T, H]
  int64_t out_stride = 0;
  const uint8_t* used = nullptr;       // [T] 0 = the row has no pair and is left alone; or nullptr
  const uint8_t* is_prompt = nullptr;  // [T] 1 = prepared for multiply_prompt; nullptr = none is
  int32_t num_tokens = 0;
  const MatrixKernels* matrix = nullptr;
  const VectorKernels* vector = nullptr;
  TailCounter* tails = nullptr;  // [2 * parts]: phase 1, then phase 2
  int32_t first_worker = 0;      // workers below it only wait at the barriers
};

// is_prompt, or nullptr where the kernels multiply all tokens alike.
inline const uint8_t* prompt_flags(const MatrixKernels& kernels, const uint8_t* is_prompt) {
  return kernels.multiply_prompt == nullptr ? nullptr : is_prompt;
}

// ids, weights: [T, K]; pairs with a negative id are left out. is_prompt: [T] or nullptr.
void group_pairs(const int32_t* ids, const float* weights, int32_t num_tokens, int32_t top_k,
                 int32_t num_experts, const uint8_t* is_prompt, Grouping& grouping);
// Asks for the weights that this worker's run_up begins with: for the time before a barrier.
void fetch_up(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers, int32_t worker);
void run_up(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers, int32_t worker);
// The same for run_down; run_up ends with it.
void fetch_down(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers,
                int32_t worker);
void run_down(const Workers& workers, const ExpertJob& job, ExpertBuffers& buffers, int32_t worker);

}  // namespace kt
