#include "experts/router.h"

#include <limits>

namespace kt {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Puts the ids of the n largest values into ids, best first; ties and NaN-free order by id.
void largest(const float* values, int32_t count, int32_t n, int32_t* ids) {
  int32_t filled = 0;
  for (int32_t i = 0; i < count; ++i) {
    const float value = values[i];
    if (filled == n && !(value > values[ids[n - 1]])) {
      continue;
    }
    int32_t at = filled < n ? filled++ : n - 1;
    // Strictly greater moves ahead, so an equal value with a lower id stays in front.
    while (at > 0 && value > values[ids[at - 1]]) {
      ids[at] = ids[at - 1];
      --at;
    }
    ids[at] = i;
  }
}

void drop_groups(const Routing& r, float* choice) {
  const int32_t size = r.num_experts / r.groups;
  float score[256] = {};
  for (int32_t g = 0; g < r.groups; ++g) {
    float best = kNever;
    float second = kNever;
    for (int32_t i = g * size; i < (g + 1) * size; ++i) {
      if (choice[i] > best) {
        second = best;
        best = choice[i];
      } else if (choice[i] > second) {
        second = choice[i];
      }
    }
    score[g] = r.sum_of_two != 0 && size > 1 ? best + second : best;
  }
  int32_t kept[256] = {};
  largest(score, r.groups, r.groups_kept, kept);
  for (int32_t g = 0; g < r.groups; ++g) {
    bool keep = false;
    for (int32_t i = 0; i < r.groups_kept; ++i) {
      keep = keep || kept[i] == g;
    }
    if (keep) {
      continue;
    }
    for (int32_t i = g * size; i < (g + 1) * size; ++i) {
      choice[i] = kNever;
    }
  }
}

}  // namespace

void select_experts(const Routing& r, const float* scores, float* choice, int32_t* ids,
                    float* weights) {
  for (int32_t e = 0; e < r.num_experts; ++e) {
    const float value = r.bias != nullptr ? scores[e] + r.bias[e] : scores[e];
    choice[e] = value == value ? value : kNever;  // NaN never wins, and the order stays total
  }
  if (r.groups > 0) {
    drop_groups(r, choice);
  }
  largest(choice, r.num_experts, r.top_k, ids);
  for (int32_t i = 1; i < r.top_k; ++i) {  // ascending ids
    const int32_t id = ids[i];
    int32_t at = i;
    for (; at > 0 && ids[at - 1] > id; --at) {
      ids[at] = ids[at - 1];
    }
    ids[at] = id;
  }
  float sum = 0.0f;
  for (int32_t i = 0; i < r.top_k; ++i) {
    weights[i] = scores[ids[i]];
    sum += weights[i];
  }
  const float norm = r.renormalise != 0 ? r.scale / (sum + 1e-20f) : r.scale;
  for (int32_t i = 0; i < r.top_k; ++i) {
    weights[i] *= norm;
  }
}

}  // namespace kt
