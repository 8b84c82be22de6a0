#include "sched/step_cost.h"

#include <algorithm>

namespace kt::sched {
namespace {

constexpr double kForget = 0.99;
constexpr double kMinWeight = 3;        // steps before the estimate is believed
constexpr int32_t kFirstBudget = 64;    // until then
constexpr double kMinSlopeShare = 0.1;  // of the mean cost per token: noise may not hide the slope

}  // namespace

void StepCost::observe(int32_t num_tokens, int64_t step_ns) {
  if (num_tokens <= 0 || step_ns <= 0) {
    return;
  }
  const auto tokens = static_cast<double>(num_tokens);
  const auto ns = static_cast<double>(step_ns);
  weight_ = weight_ * kForget + 1;
  sum_tokens_ = sum_tokens_ * kForget + tokens;
  sum_ns_ = sum_ns_ * kForget + ns;
  sum_tokens2_ = sum_tokens2_ * kForget + tokens * tokens;
  sum_tokens_ns_ = sum_tokens_ns_ * kForget + tokens * ns;
}

int32_t StepCost::budget(int64_t target_ns, int32_t limit) const {
  if (weight_ < kMinWeight) {
    return std::min(limit, kFirstBudget);
  }
  const double mean_tokens = sum_tokens_ / weight_;
  const double mean_ns = sum_ns_ / weight_;
  const double variance = sum_tokens2_ / weight_ - mean_tokens * mean_tokens;
  const double covariance = sum_tokens_ns_ / weight_ - mean_tokens * mean_ns;
  double slope = mean_ns / mean_tokens;  // steps of one size only: as if there were no base cost
  if (variance > 0.5) {
    slope = std::clamp(covariance / variance, slope * kMinSlopeShare, slope);
  }
  const double base = mean_ns - slope * mean_tokens;
  const double tokens = (static_cast<double>(target_ns) - base) / slope;
  return static_cast<int32_t>(std::clamp(tokens, 0.0, static_cast<double>(limit)));
}

}  // namespace kt::sched
