// What a step gave back: tokens, stop rules, events, the end of sequences.
#include <algorithm>
#include <string>

#include "base/error.h"
#include "sched/scheduler.h"

namespace kt::sched {

void Scheduler::commit(int64_t now_ns, const int32_t* tokens, int32_t num_samples) {
  if (in_flight_.empty()) {
    fail_state("commit without a plan");
  }
  if (num_samples != in_flight_.front().num_samples) {
    fail_argument("commit has " + std::to_string(num_samples) + " tokens, the planned step has " +
                  std::to_string(in_flight_.front().num_samples) + " logit rows");
  }
  if (num_samples > 0 && tokens == nullptr) {
    fail_argument("tokens is NULL");
  }
  Step& step = in_flight_.front();
  counters_.prefill_tokens += static_cast<uint64_t>(step.num_prefill_tokens);
  counters_.decode_tokens += static_cast<uint64_t>(step.num_decode_tokens);
  // Looking ahead, a step begins when the one before has ended, not when it was planned.
  cost_.observe(step.num_prefill_tokens, step.num_decode_tokens,
                now_ns - std::max(step.plan_ns, last_commit_ns_));
  last_commit_ns_ = now_ns;
  for (Row& row : step.rows) {
    if (row.seq != nullptr) {
      commit_row(row, tokens);
    }
  }
  in_flight_.pop_front();
}

// Events of a sequence come in the order of its tokens.
void Scheduler::require_older_committed() const {
  if (!in_flight_.empty() && in_flight_.front().id < lane_->id) {
    fail_state("a step planned before the lane's is not committed yet");
  }
}

// The time is not learned from: lane steps are not what decode rows wait for.
void Scheduler::commit_lane(int64_t /*now_ns*/, const int32_t* tokens, int32_t num_samples) {
  if (!lane_) {
    fail_state("lane commit without a lane plan");
  }
  require_older_committed();
  if (num_samples != lane_->num_samples) {
    fail_argument("lane commit has " + std::to_string(num_samples) +
                  " tokens, the planned step has " + std::to_string(lane_->num_samples) +
                  " logit rows");
  }
  if (num_samples > 0 && tokens == nullptr) {
    fail_argument("tokens is NULL");
  }
  Step step = std::move(*lane_);
  lane_.reset();
  counters_.prefill_tokens += static_cast<uint64_t>(step.num_prefill_tokens);
  counters_.decode_tokens += static_cast<uint64_t>(step.num_decode_tokens);
  for (Row& row : step.rows) {
    Sequence& seq = *row.seq;
    seq.is_in_lane = false;
    if (seq.lane_end == KT_FINISH_NONE) {
      commit_row(row, tokens);
      continue;
    }
    if (seq.lane_end == KT_FINISH_CANCELLED) {
      share(seq, row.first + row.count);  // what was computed may serve others
    }
    finish(seq, seq.lane_end);
  }
}

void Scheduler::commit_row(Row& row, const int32_t* tokens) {
  Sequence& seq = *row.seq;
  int32_t sample = row.first_sample;
  // The scored positions end where the chunk or the prompt ends.
  const int32_t scored_end = std::min(row.first + row.count, seq.prompt_len - 1);
  for (int32_t p = scored_end - row.num_scores; p < scored_end; ++p) {
    emit(seq, KT_EVENT_PROMPT_LOGPROB, KT_FINISH_NONE, seq.tokens[static_cast<size_t>(p) + 1],
         p + 1, sample++);
  }
  // A sequence preempted meanwhile keeps the token but has lost the KV.
  const bool has_pages = seq.is_running && row.admission == seq.admissions;
  if (has_pages && !seq.is_in_lane) {  // sharing may give pages back that the lane reads
    share(seq, row.first + row.count);
  }
  if (row.has_token) {
    append_token(seq, tokens[sample], sample);
  } else if (has_pages && !wants_token(seq) && row.first + row.count == seq.prompt_len) {
    finish(seq, KT_FINISH_LENGTH);  // max_tokens = 0 ends with the prompt
  }
}

void Scheduler::append_token(Sequence& seq, int32_t token, int32_t sample) {
  seq.num_pending -= 1;
  seq.tokens.push_back(token);
  hash_pages(seq);
  if (seq.history.is_on()) {
    seq.history.add_generated(token);
  }
  int32_t reason = KT_FINISH_NONE;
  const bool is_stop =
      std::find(seq.stop_ids.begin(), seq.stop_ids.end(), token) != seq.stop_ids.end();
  if (is_stop && seq.num_generated() >= seq.min_tokens) {
    reason = KT_FINISH_STOP;
  } else if (seq.num_generated() >= seq.max_tokens || seq.num_tokens() >= config_.max_len) {
    reason = KT_FINISH_LENGTH;
  }
  emit(seq, KT_EVENT_TOKEN, reason, token, seq.num_tokens() - 1, sample);
  if (reason != KT_FINISH_NONE) {
    finish(seq, reason);
  }
}

void Scheduler::fail(int64_t now_ns) {
  if (in_flight_.empty()) {
    fail_state("fail without a plan");
  }
  const Step step = std::move(in_flight_.front());
  in_flight_.pop_front();
  last_commit_ns_ = now_ns;
  fail_rows(step);
}

void Scheduler::fail_lane(int64_t /*now_ns*/) {
  if (!lane_) {
    fail_state("lane fail without a lane plan");
  }
  require_older_committed();
  const Step step = std::move(*lane_);
  lane_.reset();
  for (const Row& row : step.rows) {
    row.seq->is_in_lane = false;
  }
  fail_rows(step);
}

void Scheduler::fail_rows(const Step& step) {
  for (const Row& row : step.rows) {
    // A row of an earlier admission may be the only tie of a preempted sequence to this step: its
    // token is lost, so it ends as well.
    if (row.seq != nullptr) {
      end(*row.seq, row.seq->lane_end != KT_FINISH_NONE ? row.seq->lane_end : KT_FINISH_ERROR);
    }
  }
  if (!step.has_copies) {
    return;
  }
  // Nobody knows which of the step's page copies took place: what was to be loaded by it or since
  // is not trusted, nor is anything on the host.
  const std::vector<Sequence*> running = running_;
  for (Sequence* seq : running) {
    if (seq->ready_plan > step.id) {
      end(*seq, KT_FINISH_ERROR);
    }
  }
  forget_idle();
}

void Scheduler::emit(const Sequence& seq, int32_t kind, int32_t finish, int32_t token,
                     int32_t token_pos, int32_t sample_row) {
  kt_event event = {};
  event.seq_id = seq.seq_id;
  event.kind = kind;
  event.finish = finish;
  event.token = token;
  event.token_pos = token_pos;
  event.sample_row = sample_row;
  event.num_cached = seq.num_cached;
  event.admit_ns = seq.admit_ns;
  events_.push_back(event);
}

// Ends a sequence, at the lane's commit when it has rows there.
void Scheduler::end(Sequence& seq, int32_t reason) {
  if (!seq.is_in_lane) {
    finish(seq, reason);
  } else if (seq.lane_end == KT_FINISH_NONE) {
    seq.lane_end = reason;
    trim_rows(seq);
  }
}

// What ordinary steps in flight give for it is nobody's any more.
void Scheduler::trim_rows(const Sequence& seq) {
  for (Step& step : in_flight_) {
    for (Row& row : step.rows) {
      if (row.seq == &seq) {
        row.seq = nullptr;
      }
    }
  }
}

// Ends a sequence in any state but the lane; `seq` is gone afterwards. Steps in flight run in plan
// order, so its pages may be given to later plans at once.
void Scheduler::finish(Sequence& seq, int32_t reason) {
  emit(seq, KT_EVENT_FINISH, reason, -1, seq.num_tokens(), -1);
  release_pages(seq);
  if (seq.is_running) {
    running_.erase(std::find(running_.begin(), running_.end(), &seq));
  } else {
    waiting_.erase(seq.key);
    num_preempted_ -= seq.admissions > 0 ? 1 : 0;
  }
  trim_rows(seq);
  if (seq.admissions == 0) {
    dequeued_ += 1;
  }
  counters_.finished += 1;
  ended_.push_back(seq.seq_id);
  living_.erase(seq.seq_id);
}

}  // namespace kt::sched
