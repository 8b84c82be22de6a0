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
  cost_.observe(step.num_prefill_tokens + step.num_decode_tokens,
                now_ns - std::max(step.plan_ns, last_commit_ns_));
  last_commit_ns_ = now_ns;
  for (Row& row : step.rows) {
    if (row.seq != nullptr) {
      commit_row(row, tokens);
    }
  }
  in_flight_.pop_front();
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
  if (has_pages) {
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
  for (const Row& row : step.rows) {
    // A row of an earlier admission may be the only tie of a preempted sequence to this step: its
    // token is lost, so it ends as well.
    if (row.seq != nullptr) {
      finish(*row.seq, KT_FINISH_ERROR);
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
      finish(*seq, KT_FINISH_ERROR);
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

// Ends a sequence in any state; `seq` is gone afterwards. Steps in flight run in plan order, so its
// pages may be given to later plans at once.
void Scheduler::finish(Sequence& seq, int32_t reason) {
  emit(seq, KT_EVENT_FINISH, reason, -1, seq.num_tokens(), -1);
  release_pages(seq);
  if (seq.is_running) {
    running_.erase(std::find(running_.begin(), running_.end(), &seq));
  } else {
    waiting_.erase(seq.key);
    num_preempted_ -= seq.admissions > 0 ? 1 : 0;
  }
  for (Step& step : in_flight_) {
    for (Row& row : step.rows) {
      if (row.seq == &seq) {
        row.seq = nullptr;
      }
    }
  }
  if (seq.admissions == 0) {
    dequeued_ += 1;
  }
  counters_.finished += 1;
  ended_.push_back(seq.seq_id);
  living_.erase(seq.seq_id);
}

}  // namespace kt::sched
