// A text record of everything the scheduler was told, in the order in which it took effect.
//
// One call per line, fields separated by blanks:
//   submit <now_ns> <seq_id> <seed> <salt> <max_tokens> <min_tokens> <priority> <prompt_logprobs>
//          <has_penalty> <num_stop> <stop ids ...> <num_tokens> <prompt tokens ...>
//   cancel <seq_id>
//   plan <now_ns> <status> <digest>       digest: 16 hex digits over the plan and its block
//   commit <now_ns> <num_tokens> <tokens ...>
//   fail <now_ns>
//   lane_plan, lane_commit, lane_fail: as plan, commit, fail, for the prefill lane
// Sampling parameters other than these never influence a schedule. When the buffer is full the
// record ends with the line "overflow" and nothing is added until it has been drained.
#pragma once

#include <cstdint>
#include <string>

#include "kt.h"
#include "sched/sequence.h"

namespace kt::sched {

// Hash of everything in the block that the step depends on.
uint64_t plan_digest(const kt_block_layout& layout, const kt_plan& plan, const void* block);

// Engine thread, except drain (the caller holds a lock around all of them).
class Journal {
 public:
  void submit(const Sequence& seq);
  void cancel(uint64_t seq_id);
  // call: the line's first word.
  void plan(const char* call, int64_t now_ns, int32_t status, uint64_t digest);
  void commit(const char* call, int64_t now_ns, const int32_t* tokens, int32_t num_tokens);
  void fail(const char* call, int64_t now_ns);
  // Moves up to capacity bytes out; returns how many.
  int64_t drain(char* text, int64_t capacity);
  bool is_empty() const { return text_.empty(); }

 private:
  void add(std::string line);

  std::string text_;
  bool has_overflown_ = false;
};

}  // namespace kt::sched
