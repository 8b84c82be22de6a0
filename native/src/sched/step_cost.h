// How long steps take, learned from the steps that ran: the base of the prefill budget when a time
// between tokens is asked for.
#pragma once

#include <cstdint>

namespace kt::sched {

// Least squares of step time against tokens in the step, t = base + slope * T, over roughly the
// last hundred steps (exponentially forgotten, so that it follows longer contexts and other load).
class StepCost {
 public:
  void observe(int32_t num_tokens, int64_t step_ns);
  // Most tokens a step may have to stay within target_ns, at most `limit`.
  int32_t budget(int64_t target_ns, int32_t limit) const;

 private:
  double weight_ = 0;
  double sum_tokens_ = 0;
  double sum_ns_ = 0;
  double sum_tokens2_ = 0;
  double sum_tokens_ns_ = 0;
};

}  // namespace kt::sched
