// One token stream in the scheduler and the token history its penalties need.
//
// Filled by the submitting thread, afterwards owned by the engine thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kt.h"

namespace kt::sched {

// Distinct tokens of prompt and output with the number of times each was generated, kept up to date
// in O(1) per token: open addressing from token to index, arrays in order of first occurrence, so
// that a step copies them as they are.
class History {
 public:
  bool is_on() const { return is_on_; }
  const std::vector<int32_t>& ids() const { return ids_; }
  const std::vector<int32_t>& counts() const { return counts_; }

  void start(const std::vector<int32_t>& prompt);
  void add_generated(int32_t token) { counts_[index_of(token)] += 1; }

 private:
  size_t index_of(int32_t token);
  void grow();

  bool is_on_ = false;
  std::vector<int32_t> ids_;
  std::vector<int32_t> counts_;
  std::vector<int32_t> table_;  // index into ids_ or -1; power-of-two size, at most half full
};

// Order in which sequences are served: a priority counts like having come that much earlier, so
// that every sequence is overtaken only for a bounded time. arrival breaks ties and is unique.
struct ServiceKey {
  int64_t virtual_ns = 0;
  uint64_t arrival = 0;
  bool operator<(const ServiceKey& other) const {
    return virtual_ns != other.virtual_ns ? virtual_ns < other.virtual_ns : arrival < other.arrival;
  }
};

struct Sequence {
  // As submitted.
  uint64_t seq_id = 0;
  kt_sample_params sampling = {};  // the fields that stay the same in every step
  uint64_t cache_salt = 0;
  int32_t prompt_len = 0;
  int32_t max_tokens = 0;
  int32_t min_tokens = 0;
  int32_t priority = 0;
  int32_t prompt_logprobs = -1;
  int64_t submit_ns = 0;
  std::vector<int32_t> stop_ids;
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
  std::vector<uint64_t> hashes;  // chained hash of each full page; only with a prefix cache

  // Progress.
  std::vector<int32_t> tokens;  // prompt and committed output
  History history;
  ServiceKey key;
  int64_t admit_ns = 0;           // 0 until first admitted
  std::vector<int32_t> pages;     // page of position p is pages[p / page_size]
  std::vector<int32_t> nodes;     // the first nodes.size() pages belong to these cache nodes
  uint64_t ready_plan = 0;        // not in plans before this one: its pages are being loaded
  int32_t num_planned = 0;        // tokens whose KV exists once the steps in flight have run
  int32_t num_pending = 0;        // sampled tokens in flight (0 or 1)
  int32_t pending_row = -1;       // logit row of that token in the step in flight
  int32_t num_cached = 0;         // prompt tokens taken from the prefix cache at first admission
  int32_t num_prompt_scored = 0;  // prompt positions whose logit row is done or in flight
  uint32_t admissions = 0;        // tells a row of an earlier admission from the present one
  bool is_running = false;
  bool is_in_lane = false;            // rows of the lane step: nothing may touch its pages
  int32_t lane_end = KT_FINISH_NONE;  // how it ends at the lane's commit, whatever that gives

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_generated() const { return num_tokens() - prompt_len; }
  // Tokens known or about to be known; what a prefill has to reach.
  int32_t planned_len() const { return num_tokens() + num_pending; }
  int32_t num_remaining() const { return planned_len() - num_planned; }
};

}  // namespace kt::sched
