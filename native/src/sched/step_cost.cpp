#include "sched/step_cost.h"

#include <algorithm>

namespace kt::sched {
namespace {

constexpr double kBaseShare = 0.1;  // of a new observation in the mean
constexpr double kSlopeShare = 0.4;
constexpr double kMinPrefillShare = 0.1;  // of a step's time: noise may not hide the slope
constexpr int32_t kFirstBudget = 64;      // before anything is known

double mean(double old, double observed, double share) {
  return old == 0 ? observed : old + share * (observed - old);
}

}  // namespace

void StepCost::observe(int32_t num_prefill_tokens, int32_t num_decode_tokens, int64_t step_ns) {
  if (step_ns <= 0) {
    return;
  }
  const auto ns = static_cast<double>(step_ns);
  if (num_prefill_tokens == 0) {
    if (num_decode_tokens > 0) {
      base_ns_ = mean(base_ns_, ns, kBaseShare);
    }
    return;
  }
  const double base = num_decode_tokens > 0 ? base_ns_ : 0;
  slope_ns_ =
      mean(slope_ns_, std::max(ns - base, ns * kMinPrefillShare) / num_prefill_tokens, kSlopeShare);
}

int32_t StepCost::budget(int64_t target_ns, int32_t limit) const {
  if (slope_ns_ == 0) {
    return std::min(limit, kFirstBudget);
  }
  const double tokens = (static_cast<double>(target_ns) - base_ns_) / slope_ns_;
  return static_cast<int32_t>(std::clamp(tokens, 0.0, static_cast<double>(limit)));
}

}  // namespace kt::sched
