// Continuous batching over paged KV: decides which tokens of which sequences run in the next step.
//
// Owned by the engine thread; no clock, no threads, no I/O: sequences, cancellations and times come
// in as arguments, so that the same calls give the same schedule on every machine.
//
// DESIGN
//  waiting_  sequences without pages, in service order (ServiceKey).
//  running_  sequences with pages, in service order. A sequence that loses its pages (preemption)
//            goes back to waiting_ with its old key, so it is first in line again, and recomputes
//            prompt and sent output as one prefill; nothing is sent twice.
//  A step    first gives every decoding sequence its one token, oldest first, preempting the
//            youngest when pages run out; then gives what is left of the token budget to prefills,
//            oldest first; then admits from the head of waiting_ only (no overtaking).
//  Progress  the oldest running sequence can always take pages from the younger ones, and a single
//            sequence always fits the pool (checked at create and submit), so every sequence ends
//            after a bounded number of steps.
//  Sharing   full pages become nodes of the prefix tree at the commit that computed them; from then
//  on
//            every sequence with the same prefix uses the same page, also one that computed it
//            itself.
//  Look-ahead a step planned before the commit of the one before feeds the token that is still
//  being
//            sampled (num_pending); steps run in plan order, so a page freed now may be written by
//            later plans while the step in flight still reads it.
//  Lane      a step of prompt tokens that runs beside ordinary steps. Its sequences are left alone
//            until its commit: they are in no other step, are not preempted (who needs a page
//            waits, and the lane stays empty until that is settled), and end only then.
//  Promise   admission sets aside the pages that running prefills still lack, plus a watermark, so
//            that an admitted prompt is not preempted half way by the next one.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kt.h"
#include "sched/block.h"
#include "sched/pages.h"
#include "sched/prefix.h"
#include "sched/sequence.h"
#include "sched/step_cost.h"

namespace kt::sched {

// Refuses values out of range; the message names the field.
void check_config(const kt_sched_config& config);

// Copies and checks a request. [any thread] Throws Error(KT_ERR_ARGUMENT) when it can never run.
std::unique_ptr<Sequence> make_sequence(const kt_sched_config& config, const kt_request& request,
                                        int64_t now_ns);

class Scheduler {
 public:
  explicit Scheduler(const kt_sched_config& config);

  const kt_block_layout& layout() const { return layout_; }

  void add(std::unique_ptr<Sequence> seq);
  void cancel(uint64_t seq_id);
  // Throws Error(KT_ERR_STATE) when a commit has to come first; nothing has changed then.
  void require_plannable() const;
  // KT_OK or KT_IDLE, see kt_sched_plan.
  int32_t plan(int64_t now_ns, void* block, kt_plan* out);
  void commit(int64_t now_ns, const int32_t* tokens, int32_t num_samples);
  void fail(int64_t now_ns);
  // The same for the lane.
  void require_lane_plannable() const;
  int32_t plan_lane(int64_t now_ns, void* block, kt_plan* out);
  void commit_lane(int64_t now_ns, const int32_t* tokens, int32_t num_samples);
  void fail_lane(int64_t now_ns);
  int32_t drain(kt_event* events, int32_t capacity);

  bool has_events() const { return !events_.empty(); }
  bool has_work() const { return !living_.empty() || !events_.empty(); }
  // What is wrong with the state, or NULL. O(pages).
  const char* check() const;
  kt_sched_stats stats() const;
  // Ids of sequences that ended since the last call, and how many left the queue for good.
  std::vector<uint64_t> take_ended() { return std::exchange(ended_, {}); }
  int32_t take_dequeued() { return std::exchange(dequeued_, 0); }

 private:
  // What a row of a step in flight will give back.
  struct Row {
    Sequence* seq;  // NULL once the sequence has ended: its results are trimmed
    uint32_t admission;
    int32_t first;  // position of its first token
    int32_t count;
    int32_t first_sample;
    int32_t num_scores;  // logit rows of prompt tokens; come before the sampled one
    bool has_token;      // the last logit row samples a new token
  };
  struct Step {
    uint64_t id = 0;
    int64_t plan_ns = 0;
    int32_t num_samples = 0;
    int32_t num_decode_tokens = 0;
    int32_t num_prefill_tokens = 0;
    bool has_copies = false;
    bool is_lane = false;
    std::vector<Row> rows;
  };
  // What may still be added to the step being planned.
  struct Budget {
    int32_t tokens = 0;
    int32_t samples = 0;
    int64_t history = 0;
  };
  // Cached path of a waiting sequence, remembered while it has to wait.
  struct Match {
    uint64_t arrival = UINT64_MAX;
    uint64_t num_removed = 0;
    std::vector<int32_t> nodes;
  };

  int32_t pages_for(int32_t num_tokens) const {
    return (num_tokens + config_.page_size - 1) / config_.page_size;
  }
  bool has_flag(uint32_t flag) const { return (config_.flags & flag) != 0; }
  bool wants_token(const Sequence& seq) const { return seq.max_tokens > 0; }
  bool is_decoding(const Sequence& seq) const {
    return seq.num_remaining() == 1 && wants_token(seq);
  }
  bool may_run(const Sequence& seq) const;
  bool ends_by_length(const Sequence& seq) const;
  int32_t num_scores(const Sequence& seq, int32_t count) const;
  int32_t fit_samples(const Sequence& seq, int32_t count, const Budget& budget) const;

  // plan.cpp
  Step begin_step(int64_t now_ns, kt_plan* out);
  Budget full_budget() const;
  bool end_step(Step& step, void* block, kt_plan* out);
  bool belongs_to_lane(const Step& step);
  bool lane_is_worth_it();
  void expire(int64_t now_ns);
  void plan_decodes(Step& step, Budget& budget);
  void limit_prefill(const Step& step, Budget& budget) const;
  void plan_prefills(Step& step, Budget& budget);
  void admit(int64_t now_ns, Step& step, Budget& budget);
  bool admit_one(Sequence& seq, int64_t promised, int64_t now_ns);
  bool plan_chunk(Sequence& seq, Step& step, Budget& budget);
  void add_row(Sequence& seq, int32_t count, Step& step, Budget& budget);
  void write(Step& step, void* block, kt_plan* out);

  // paging.cpp
  int32_t num_available() const { return pool_.num_free() + tree_.num_idle(); }
  int32_t take_page();
  int32_t take_host_page();
  bool reserve(Sequence& seq, int32_t num_tokens, bool may_preempt);
  int64_t promised_pages() const;
  size_t max_shared_pages(const Sequence& seq) const;
  void hash_pages(Sequence& seq);
  const std::vector<int32_t>& match(const Sequence& seq);
  void use_node(Sequence& seq, int32_t id);
  void load_node(int32_t id);
  void adopt(Sequence& seq);
  void share(Sequence& seq, int32_t num_computed);
  void preempt(Sequence& seq);
  void release_pages(Sequence& seq);
  void forget_idle();
  const char* check_pages() const;

  // commit.cpp
  void end(Sequence& seq, int32_t reason);
  void trim_rows(const Sequence& seq);
  void fail_rows(const Step& step);
  void require_older_committed() const;
  void finish(Sequence& seq, int32_t reason);
  void emit(const Sequence& seq, int32_t kind, int32_t finish, int32_t token, int32_t token_pos,
            int32_t sample_row);
  void commit_row(Row& row, const int32_t* tokens);
  void append_token(Sequence& seq, int32_t token, int32_t sample);

  kt_sched_config config_;
  kt_block_layout layout_;
  BlockCapacity capacity_;
  PagePool pool_;
  PagePool host_pool_;
  PrefixTree tree_;
  StepCost cost_;
  std::unordered_map<uint64_t, std::unique_ptr<Sequence>> living_;  // never iterated in decisions
  std::map<ServiceKey, Sequence*> waiting_;
  std::vector<Sequence*> running_;                      // ascending key
  std::deque<std::pair<uint64_t, uint64_t>> arrivals_;  // (seq_id, arrival) by age, for the timeout
  std::deque<Step> in_flight_;                          // planned, not committed; oldest first
  std::optional<Step> lane_;                            // the lane's, likewise
  bool lane_blocks_pages_ = false;                      // a decode row waits for the lane's pages
  std::deque<kt_event> events_;
  Match match_;
  std::vector<PageCopy> copies_out_;  // of the plan being made
  std::vector<PageCopy> copies_in_;
  std::vector<int32_t> host_freed_;  // read by copies_in of the last plan: free from the next on
  std::vector<uint64_t> ended_;
  int32_t dequeued_ = 0;
  int32_t num_preempted_ = 0;
  uint64_t num_arrived_ = 0;
  uint64_t plan_id_ = 0;  // of the plan being made or made last
  int64_t last_submit_ns_ = INT64_MIN / 4;
  int64_t last_commit_ns_ = INT64_MIN;
  kt_sched_stats counters_ = {};
};

}  // namespace kt::sched
