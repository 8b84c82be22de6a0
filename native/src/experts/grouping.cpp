// What an expert layer needs before its two phases: checked weights, memory, pairs by expert.
#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"
#include "experts/experts.h"

namespace kt {

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
                             int64_t mid_row_bytes, int32_t max_cols, int32_t max_rows,
                             ExpertBuffers& buffers) {
  const int64_t max_bands = (int64_t{max_rows} + kBandRows - 1) / kBandRows;
  buffers.max_pairs = max_pairs;
  buffers.max_experts = max_experts;
  buffers.mid = arena.allocate(max_pairs * mid_row_bytes);
  buffers.kept_pairs = std::min(max_pairs, kKeptPairs);
  buffers.kept = arena.allocate_array<float>(max_bands * buffers.kept_pairs * kBandRows);
  buffers.arrived = arena.allocate_array<TailCounter>(max_bands);
  for (int32_t w = 0; w < workers.num_threads(); ++w) {
    Grouping grouping;
    grouping.start = arena.allocate_array<int32_t>(max_experts + 1);
    grouping.prompt = arena.allocate_array<int32_t>(max_experts);
    grouping.active = arena.allocate_array<int32_t>(max_experts);
    grouping.tokens = arena.allocate_array<int32_t>(max_pairs);
    grouping.weights = arena.allocate_array<float>(max_pairs);
    buffers.groupings.push_back(grouping);
    buffers.temps.push_back(
        arena.allocate_array<float>(2 * kPromptRows * kPromptUnits * kUnitRows));
    buffers.rows.push_back(
        arena.allocate(std::max(kGatherBytes, act_row_bytes(kActBf16, max_cols))));
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

}  // namespace kt
