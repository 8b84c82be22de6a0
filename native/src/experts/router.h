// Which experts a token uses and with which weights.
#pragma once

#include <cstdint>

namespace kt {

struct Routing {
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t sigmoid = 0;      // 0 softmax, 1 sigmoid
  int32_t renormalise = 0;  // weights of the chosen experts sum to 1
  int32_t groups = 0;       // 0 = no grouping
  int32_t groups_kept = 0;
  int32_t sum_of_two = 0;  // a group scores the sum of its two best experts, else its best
  float scale = 1.0f;
  const float* bias = nullptr;  // [E] added for the choice only
};

// scores: [E] logits on entry turned into probabilities by the caller; choice: scratch [E].
// Writes ids ascending by expert id (equal experts of a batch then lie together) and their weights.
// Equal scores: the lowest id wins. Sources: Qwen3-MoE and DeepSeek-V2/V3 reference routers.
void select_experts(const Routing& routing, const float* scores, float* choice, int32_t* ids,
                    float* weights);

}  // namespace kt
