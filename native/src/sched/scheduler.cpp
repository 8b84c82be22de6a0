#include "sched/scheduler.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"

namespace kt::sched {
namespace {

// One step of priority counts like having come this much earlier.
constexpr int64_t kPriorityStepNs = 10'000'000'000;

bool contains(const std::vector<int32_t>& values, int32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

Scheduler::Scheduler(const kt_sched_config& config)
    : config_(config),
      layout_(block_layout(config)),
      capacity_(block_capacity(config)),
      pool_(config.num_pages) {
  if (config_.watermark_pages < 0) {
    config_.watermark_pages = std::max(1, config_.num_pages / 100);
  }
  counters_.struct_size = sizeof(counters_);
  counters_.pages_total = config.num_pages;
}

void Scheduler::add(std::unique_ptr<Sequence> owned) {
  Sequence& seq = *owned;
  // Submitting threads may read their clocks in another order than they arrive here.
  last_submit_ns_ = std::max(last_submit_ns_, seq.submit_ns);
  seq.key = {last_submit_ns_ - seq.priority * kPriorityStepNs, num_arrived_++};
  waiting_.emplace(seq.key, &seq);
  living_.emplace(seq.seq_id, std::move(owned));
  counters_.submitted += 1;
}

void Scheduler::cancel(uint64_t seq_id) {
  const auto it = living_.find(seq_id);
  if (it == living_.end()) {
    return;
  }
  counters_.cancelled += 1;
  finish(*it->second, KT_FINISH_CANCELLED);
}

// ---- plan ----

int32_t Scheduler::plan(int64_t now_ns, void* block, kt_plan* out) {
  if (!in_flight_.empty()) {
    fail_state("plan before the commit of the step before");
  }
  *out = {};
  out->struct_size = sizeof(*out);
  expire(now_ns);
  Step step;
  Budget budget;
  budget.tokens = layout_.max_tokens;
  budget.samples = config_.max_samples;
  budget.history = capacity_.history;
  plan_decodes(step, budget);
  plan_prefills(step, budget);
  admit(now_ns, step, budget);
  if (step.rows.empty()) {
    return KT_IDLE;
  }
  step.id = next_step_id_++;
  write(step, block, out);
  counters_.steps += 1;
  in_flight_.push_back(std::move(step));
  return KT_OK;
}

void Scheduler::expire(int64_t now_ns) {
  if (config_.queue_timeout_ns == 0) {
    return;
  }
  std::vector<Sequence*> late;
  for (const auto& [key, seq] : waiting_) {
    // A preempted sequence has been served before: it is not in the queue any more.
    if (seq->admissions == 0 && now_ns - seq->submit_ns > config_.queue_timeout_ns) {
      late.push_back(seq);
    }
  }
  for (Sequence* seq : late) {
    finish(*seq, KT_FINISH_TIMEOUT);
  }
}

// False while the sequence has to wait for a commit before it can be planned further.
bool Scheduler::may_run(const Sequence& seq) const {
  return seq.num_remaining() > 0 && !ends_by_length(seq);
}

bool Scheduler::ends_by_length(const Sequence& seq) const {
  if (seq.num_pending == 0) {
    return false;
  }
  return seq.num_generated() + seq.num_pending >= seq.max_tokens ||
         seq.planned_len() >= config_.max_len;
}

void Scheduler::plan_decodes(Step& step, Budget& budget) {
  // reserve() may shorten running_ from the back, never before the sequence it serves.
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& seq = *running_[i];
    if (!is_decoding(seq) || !may_run(seq)) {
      continue;
    }
    const auto history = static_cast<int64_t>(seq.history.ids().size());
    if (history > budget.history) {
      continue;
    }
    if (!reserve(seq, seq.num_planned + 1, true)) {
      continue;
    }
    add_row(seq, 1, step, budget);
  }
}

void Scheduler::plan_prefills(Step& step, Budget& budget) {
  for (size_t i = 0; i < running_.size() && budget.tokens > 0; ++i) {
    Sequence& seq = *running_[i];
    if (is_decoding(seq) || !may_run(seq)) {
      continue;
    }
    plan_chunk(seq, step, budget);
  }
}

void Scheduler::admit(int64_t now_ns, Step& step, Budget& budget) {
  int64_t promised = promised_pages();
  const bool is_single = config_.policy == KT_SCHED_FCFS_SINGLE_PREFILL;
  bool is_prefilling = std::any_of(running_.begin(), running_.end(),
                                   [](const Sequence* s) { return s->num_remaining() > 0; });
  while (!waiting_.empty() && budget.tokens > 0) {
    if (running_.size() >= static_cast<size_t>(config_.max_batch_size)) {
      return;
    }
    if (is_single && is_prefilling) {
      return;
    }
    Sequence& seq = *waiting_.begin()->second;
    if (seq.num_pending > 0) {
      return;  // preempted in flight: its length is known after the commit
    }
    const int64_t watermark = running_.empty() ? 0 : config_.watermark_pages;
    const int64_t need = pages_for(seq.num_tokens());
    if (pool_.num_free() < need + promised + watermark) {
      return;
    }
    waiting_.erase(waiting_.begin());
    running_.insert(std::upper_bound(running_.begin(), running_.end(), &seq,
                                     [](auto* a, auto* b) { return a->key < b->key; }),
                    &seq);
    seq.is_running = true;
    if (seq.admissions++ == 0) {
      seq.admit_ns = now_ns;
      dequeued_ += 1;
    }
    plan_chunk(seq, step, budget);
    promised += need - static_cast<int64_t>(seq.pages.size());
    is_prefilling = seq.num_remaining() > 0;
  }
}

// Plans as much of a prefill as tokens, logit rows and pages allow; true when that is anything.
bool Scheduler::plan_chunk(Sequence& seq, Step& step, Budget& budget) {
  int32_t count = fit_samples(seq, std::min(seq.num_remaining(), budget.tokens), budget);
  if (count == 0) {
    return false;
  }
  if (!reserve(seq, seq.num_planned + count, false)) {
    // An empty step frees no pages, now or later: then the younger must give theirs.
    const bool is_stuck = step.rows.empty() && in_flight_.empty();
    if (is_stuck && !reserve(seq, seq.num_planned + 1, true)) {
      return false;
    }
    const int32_t room =
        static_cast<int32_t>(seq.pages.size()) * config_.page_size - seq.num_planned;
    count = std::min(count, room);
    if (count <= 0) {
      return false;
    }
  }
  add_row(seq, count, step, budget);
  return true;
}

// Logit rows of prompt tokens that a chunk of `count` tokens must have: position p scores the
// prompt token p + 1, and what an earlier admission has scored is not scored again.
int32_t Scheduler::num_scores(const Sequence& seq, int32_t count) const {
  if (seq.prompt_logprobs < 0) {
    return 0;
  }
  const int32_t first = std::max(seq.num_planned, seq.num_prompt_scored);
  const int32_t end = std::min(seq.num_planned + count, seq.prompt_len - 1);
  return std::max(0, end - first);
}

// Largest count <= `count` whose logit rows and penalty history fit the budget.
int32_t Scheduler::fit_samples(const Sequence& seq, int32_t count, const Budget& budget) const {
  if (seq.prompt_logprobs >= 0) {
    const int32_t first = std::max(seq.num_planned, seq.num_prompt_scored);
    if (num_scores(seq, count) > budget.samples) {
      count = first + budget.samples - seq.num_planned;
    }
  }
  const bool is_last = count == seq.num_remaining();
  const bool has_room = num_scores(seq, count) < budget.samples &&
                        static_cast<int64_t>(seq.history.ids().size()) <= budget.history;
  if (is_last && wants_token(seq) && !has_room) {
    count -= 1;
  }
  return count;
}

void Scheduler::add_row(Sequence& seq, int32_t count, Step& step, Budget& budget) {
  Row row = {};
  row.seq = &seq;
  row.admission = seq.admissions;
  row.first = seq.num_planned;
  row.count = count;
  row.num_scores = num_scores(seq, count);
  row.has_token = count == seq.num_remaining() && wants_token(seq);
  budget.tokens -= count;
  budget.samples -= row.num_scores + (row.has_token ? 1 : 0);
  if (row.has_token) {
    budget.history -= static_cast<int64_t>(seq.history.ids().size());
  }
  step.rows.push_back(row);
}

void Scheduler::write(Step& step, void* block, kt_plan* out) {
  BlockWriter writer(layout_, config_.page_size, block, out);
  // Rows with one token and one logit row come first; a prefill's last token is such a row too.
  std::stable_partition(step.rows.begin(), step.rows.end(), [](const Row& row) {
    return row.count == 1 && row.num_scores == 0 && row.has_token;
  });
  for (Row& row : step.rows) {
    Sequence& seq = *row.seq;
    writer.add_row(seq, row.count);
    row.first_sample = out->num_samples;
    if (row.num_scores > 0) {
      const int32_t begin = std::max(row.first, seq.num_prompt_scored);
      for (int32_t p = begin; p < begin + row.num_scores; ++p) {
        writer.add_sample(seq, p, seq.tokens[static_cast<size_t>(p) + 1]);
      }
      seq.num_prompt_scored = begin + row.num_scores;
    }
    const int32_t end = row.first + row.count;
    const bool is_decode = row.first >= seq.prompt_len;
    (is_decode && row.count == 1 ? step.num_decode_tokens : step.num_prefill_tokens) += row.count;
    if (row.count == 1 && row.num_scores == 0 && row.has_token) {
      out->num_decode_rows += 1;
    }
    seq.num_planned = end;
    if (row.has_token) {
      seq.pending_row = writer.add_sample(seq, end - 1, -1);
      seq.num_pending = 1;
    }
  }
  step.num_samples = out->num_samples;
  writer.finish(step.id);
}

// ---- pages ----

// Gives `seq` pages for its first num_tokens tokens. May take pages from younger sequences when
// asked. On failure it keeps the pages it got.
bool Scheduler::reserve(Sequence& seq, int32_t num_tokens, bool may_preempt) {
  const auto need = static_cast<size_t>(pages_for(num_tokens));
  while (seq.pages.size() < need) {
    const int32_t page = pool_.take();
    if (page >= 0) {
      seq.pages.push_back(page);
      continue;
    }
    Sequence* youngest = running_.back();
    if (!may_preempt) {
      return false;
    }
    preempt(*youngest);
    if (youngest == &seq) {
      return false;
    }
  }
  return true;
}

int64_t Scheduler::promised_pages() const {
  int64_t promised = 0;
  for (const Sequence* seq : running_) {
    promised += std::max<int64_t>(
        0, pages_for(seq->num_tokens()) - static_cast<int64_t>(seq->pages.size()));
  }
  return promised;
}

void Scheduler::preempt(Sequence& seq) {
  release_pages(seq);
  running_.erase(std::find(running_.begin(), running_.end(), &seq));
  seq.is_running = false;
  waiting_.emplace(seq.key, &seq);
  counters_.preempted += 1;
}

void Scheduler::release_pages(Sequence& seq) {
  for (auto it = seq.pages.rbegin(); it != seq.pages.rend(); ++it) {
    pool_.release(*it);
  }
  seq.pages.clear();
  seq.num_planned = 0;
}

// ---- commit ----

void Scheduler::commit(int64_t, const int32_t* tokens, int32_t num_samples) {
  if (in_flight_.empty()) {
    fail_state("commit without a plan");
  }
  Step& step = in_flight_.front();
  if (num_samples != step.num_samples) {
    fail_argument("commit has " + std::to_string(num_samples) + " tokens, the planned step has " +
                  std::to_string(step.num_samples) + " logit rows");
  }
  if (num_samples > 0 && tokens == nullptr) {
    fail_argument("tokens is NULL");
  }
  counters_.prefill_tokens += static_cast<uint64_t>(step.num_prefill_tokens);
  counters_.decode_tokens += static_cast<uint64_t>(step.num_decode_tokens);
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
  if (!row.has_token) {
    // max_tokens = 0 ends with the prompt.
    const bool is_done = !wants_token(seq) && row.first + row.count == seq.prompt_len;
    if (is_done && row.admission == seq.admissions && seq.is_running) {
      finish(seq, KT_FINISH_LENGTH);
    }
    return;
  }
  const int32_t token = tokens[sample];
  seq.num_pending = 0;
  seq.tokens.push_back(token);
  if (seq.history.is_on()) {
    seq.history.add_generated(token);
  }
  int32_t reason = KT_FINISH_NONE;
  if (seq.num_generated() >= seq.min_tokens && contains(seq.stop_ids, token)) {
    reason = KT_FINISH_STOP;
  } else if (seq.num_generated() >= seq.max_tokens || seq.num_tokens() >= config_.max_len) {
    reason = KT_FINISH_LENGTH;
  }
  emit(seq, KT_EVENT_TOKEN, reason, token, seq.num_tokens() - 1, sample);
  if (reason != KT_FINISH_NONE) {
    finish(seq, reason);
  }
}

void Scheduler::fail(int64_t) {
  if (in_flight_.empty()) {
    fail_state("fail without a plan");
  }
  const Step step = std::move(in_flight_.front());
  in_flight_.pop_front();
  for (const Row& row : step.rows) {
    if (row.seq != nullptr) {
      finish(*row.seq, KT_FINISH_ERROR);
    }
  }
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

// Ends a sequence in any state; `seq` is gone afterwards.
void Scheduler::finish(Sequence& seq, int32_t reason) {
  emit(seq, KT_EVENT_FINISH, reason, -1, seq.num_tokens(), -1);
  release_pages(seq);
  if (seq.is_running) {
    running_.erase(std::find(running_.begin(), running_.end(), &seq));
  } else {
    waiting_.erase(seq.key);
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

int32_t Scheduler::drain(kt_event* events, int32_t capacity) {
  const auto count =
      static_cast<int32_t>(std::min<size_t>(events_.size(), static_cast<size_t>(capacity)));
  std::copy_n(events_.begin(), count, events);
  events_.erase(events_.begin(), events_.begin() + count);
  return count;
}

kt_sched_stats Scheduler::stats() const {
  kt_sched_stats stats = counters_;
  stats.num_waiting = static_cast<int32_t>(waiting_.size());
  stats.num_running = static_cast<int32_t>(running_.size());
  stats.pages_free = pool_.num_free();
  stats.pages_used = stats.pages_total - stats.pages_free;
  return stats;
}

}  // namespace kt::sched
