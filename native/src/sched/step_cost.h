// How long steps take, learned from the steps that ran: the base of the prefill budget when a time
// between tokens is asked for.
#pragma once

#include <cstdint>

namespace kt::sched {

// A step takes base + slope * prompt tokens. base follows the steps without prompt tokens; slope
// the others, quickly, because a token costs more the longer its context and the smaller its chunk.
class StepCost {
 public:
  void observe(int32_t num_prefill_tokens, int32_t num_decode_tokens, int64_t step_ns);
  // Most prompt tokens beside decode rows to stay within target_ns, at most `limit`.
  int32_t budget(int64_t target_ns, int32_t limit) const;

 private:
  double base_ns_ = 0;
  double slope_ns_ = 0;  // 0 until a step had prompt tokens
};

}  // namespace kt::sched
