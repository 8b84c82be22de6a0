// Choosing the rows of a step.
#include <algorithm>

#include "base/error.h"
#include "sched/scheduler.h"

namespace kt::sched {
namespace {

// Prefill tokens a step has at least, however tight the target time: prompts keep moving.
constexpr int32_t kMinPrefillTokens = 16;

}  // namespace

void Scheduler::require_plannable() const {
  const size_t most_in_flight = has_flag(KT_SCHED_LOOKAHEAD) ? 1 : 0;
  if (in_flight_.size() > most_in_flight) {
    fail_state("plan before the commit of the step before");
  }
}

int32_t Scheduler::plan(int64_t now_ns, void* block, kt_plan* out) {
  require_plannable();
  Step step = begin_step(now_ns, out);
  Budget budget = full_budget();
  lane_blocks_pages_ = false;
  plan_decodes(step, budget);
  const bool leaves_prefill = belongs_to_lane(step);
  if (!leaves_prefill) {
    limit_prefill(step, budget);
    plan_prefills(step, budget);
    admit(now_ns, step, budget);
  }
  if (!end_step(step, block, out)) {
    return KT_IDLE;
  }
  out->lane_waits = leaves_prefill && !lane_ ? 1 : 0;
  in_flight_.push_back(std::move(step));
  return KT_OK;
}

void Scheduler::require_lane_plannable() const {
  if (config_.lane_tokens == 0) {
    fail_state("there is no prefill lane: lane_tokens is 0");
  }
  if (lane_) {
    fail_state("lane plan before the commit of the lane step before");
  }
}

int32_t Scheduler::plan_lane(int64_t now_ns, void* block, kt_plan* out) {
  require_lane_plannable();
  Step step = begin_step(now_ns, out);
  step.is_lane = true;
  const bool somebody_decodes = std::any_of(
      running_.begin(), running_.end(), [this](const Sequence* seq) { return is_decoding(*seq); });
  if (!somebody_decodes || lane_blocks_pages_ || !lane_is_worth_it()) {
    return KT_IDLE;
  }
  Budget budget = full_budget();
  plan_prefills(step, budget);
  admit(now_ns, step, budget);
  if (!end_step(step, block, out)) {
    return KT_IDLE;
  }
  for (const Row& row : step.rows) {
    row.seq->is_in_lane = true;
  }
  counters_.lane_steps += 1;
  lane_ = std::move(step);
  return KT_OK;
}

Scheduler::Step Scheduler::begin_step(int64_t now_ns, kt_plan* out) {
  *out = {};
  out->struct_size = sizeof(*out);
  plan_id_ += 1;
  for (const int32_t page : host_freed_) {
    host_pool_.give_back(page);
  }
  host_freed_.clear();
  copies_out_.clear();
  copies_in_.clear();
  expire(now_ns);
  Step step;
  step.id = plan_id_;
  step.plan_ns = now_ns;
  return step;
}

Scheduler::Budget Scheduler::full_budget() const {
  Budget budget;
  budget.tokens = layout_.max_tokens;
  budget.samples = config_.max_samples;
  budget.history = capacity_.history;
  return budget;
}

// Writes the step; false when there is nothing in it.
bool Scheduler::end_step(Step& step, void* block, kt_plan* out) {
  step.has_copies = !copies_out_.empty() || !copies_in_.empty();
  if (step.rows.empty() && !step.has_copies) {
    return false;
  }
  write(step, block, out);
  counters_.steps += 1;
  counters_.copied_out_pages += copies_out_.size();
  counters_.copied_in_pages += copies_in_.size();
  return true;
}

// Whether an ordinary step leaves prompt tokens to the lane: while one runs there, and when there
// are many beside decode rows, which would have to wait for them.
bool Scheduler::belongs_to_lane(const Step& step) {
  if (config_.lane_tokens == 0) {
    return false;
  }
  return lane_ || (!step.rows.empty() && lane_is_worth_it());
}

// Whether lane_tokens prompt tokens wait to be computed. What the cache has is known for the head
// of the queue only; those behind it count in full.
bool Scheduler::lane_is_worth_it() {
  int64_t count = 0;
  bool is_prefilling = false;
  for (const Sequence* seq : running_) {
    if (seq->num_remaining() > 0 && !is_decoding(*seq)) {
      is_prefilling = true;
      count += seq->num_remaining();
    }
  }
  auto room = static_cast<int64_t>(config_.max_batch_size) - static_cast<int64_t>(running_.size());
  const bool may_admit = !(is_prefilling && config_.policy == KT_SCHED_FCFS_SINGLE_PREFILL);
  for (auto it = waiting_.begin(); may_admit && it != waiting_.end(); ++it) {
    if (count >= config_.lane_tokens || room-- <= 0) {
      break;
    }
    const Sequence& seq = *it->second;
    count += seq.num_tokens();
    if (it == waiting_.begin()) {
      count -= static_cast<int64_t>(match(seq).size()) * config_.page_size;
    }
    if (config_.policy == KT_SCHED_FCFS_SINGLE_PREFILL) {
      break;
    }
  }
  return count >= config_.lane_tokens;
}

// Ends what has waited too long. A preempted sequence has been served before: it stays.
void Scheduler::expire(int64_t now_ns) {
  while (!arrivals_.empty()) {
    const auto [seq_id, arrival] = arrivals_.front();
    const auto it = living_.find(seq_id);
    const bool is_queued =
        it != living_.end() && it->second->key.arrival == arrival && it->second->admissions == 0;
    if (is_queued) {
      if (now_ns - it->second->submit_ns <= config_.queue_timeout_ns) {
        return;
      }
      counters_.timed_out += 1;
      finish(*it->second, KT_FINISH_TIMEOUT);
    }
    arrivals_.pop_front();
  }
}

// False while the sequence has to wait for a commit or for its pages.
bool Scheduler::may_run(const Sequence& seq) const {
  if (seq.is_in_lane) {
    return false;
  }
  if (seq.num_pending > 0 && (seq.history.is_on() || ends_by_length(seq))) {
    return false;
  }
  return seq.num_remaining() > 0 && seq.ready_plan <= plan_id_;
}

// Whether the token in flight is certainly the last one.
bool Scheduler::ends_by_length(const Sequence& seq) const {
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
    if (static_cast<int64_t>(seq.history.ids().size()) > budget.history) {
      continue;
    }
    if (!reserve(seq, seq.num_planned + 1, true)) {
      continue;
    }
    add_row(seq, 1, step, budget);
  }
}

// Keeps the step within the target time between tokens when somebody is decoding.
void Scheduler::limit_prefill(const Step& step, Budget& budget) const {
  if (config_.target_itl_ns == 0 || step.rows.empty()) {
    return;
  }
  const int32_t in_time = cost_.budget(config_.target_itl_ns, layout_.max_tokens);
  budget.tokens = std::min(budget.tokens, std::max(in_time, kMinPrefillTokens));
}

void Scheduler::plan_prefills(Step& step, Budget& budget) {
  for (size_t i = 0; i < running_.size() && budget.tokens > 0; ++i) {
    Sequence& seq = *running_[i];
    if (!is_decoding(seq) && may_run(seq)) {
      plan_chunk(seq, step, budget);
    }
  }
}

// Admits from the head of the queue only, so that nobody is overtaken.
void Scheduler::admit(int64_t now_ns, Step& step, Budget& budget) {
  if (waiting_.empty()) {
    return;
  }
  int64_t promised = promised_pages();
  // num_planned moves when the step is written: a prompt that ends in this step still counts.
  bool is_prefilling = std::any_of(running_.begin(), running_.end(), [this](const Sequence* seq) {
    return seq->num_remaining() > 0 && !is_decoding(*seq);
  });
  while (!waiting_.empty() && budget.tokens > 0) {
    if (running_.size() >= static_cast<size_t>(config_.max_batch_size)) {
      return;
    }
    if (is_prefilling && config_.policy == KT_SCHED_FCFS_SINGLE_PREFILL) {
      return;
    }
    Sequence& seq = *waiting_.begin()->second;
    // Preempted in flight: its length is known after the commit.
    if (seq.num_pending > 0 || !admit_one(seq, promised, now_ns)) {
      return;
    }
    if (may_run(seq)) {
      plan_chunk(seq, step, budget);
    }
    promised += pages_for(seq.num_tokens()) - static_cast<int64_t>(seq.pages.size());
    is_prefilling = true;
  }
}

// Moves `seq` to running_ with the cached part of its pages, if the rest fits beside `promised`.
bool Scheduler::admit_one(Sequence& seq, int64_t promised, int64_t now_ns) {
  const int64_t watermark = running_.empty() ? 0 : config_.watermark_pages;
  if (num_available() <= promised + watermark) {
    return false;  // before the work of matching
  }
  const std::vector<int32_t>& cached = match(seq);
  int64_t need = pages_for(seq.num_tokens());
  for (const int32_t id : cached) {
    // A page in use costs nothing, an idle one is no longer available to others, and one on the
    // host needs a device page.
    const PrefixTree::Node& node = tree_.node(id);
    if (node.page >= 0 && node.refs > 0) {
      need -= 1;
    }
  }
  if (num_available() < need + promised + watermark) {
    return false;
  }

  waiting_.erase(waiting_.begin());
  running_.insert(std::upper_bound(running_.begin(), running_.end(), &seq,
                                   [](auto* a, auto* b) { return a->key < b->key; }),
                  &seq);
  seq.is_running = true;
  seq.ready_plan = 0;
  if (seq.admissions++ == 0) {
    seq.admit_ns = now_ns;
    dequeued_ += 1;
    counters_.prefix_query_tokens +=
        has_flag(KT_SCHED_PREFIX_CACHE) ? static_cast<uint64_t>(seq.prompt_len) : 0;
  } else {
    num_preempted_ -= 1;
  }
  // The whole path is referenced before a page is taken: taking one may evict.
  for (const int32_t id : cached) {
    tree_.acquire(id);
  }
  for (const int32_t id : cached) {
    if (tree_.node(id).page < 0) {
      load_node(id);
    }
    use_node(seq, id);
  }
  return true;
}

// Plans as much of a prefill as tokens, logit rows and pages allow; true when that is anything.
bool Scheduler::plan_chunk(Sequence& seq, Step& step, Budget& budget) {
  adopt(seq);
  int32_t count = fit_samples(seq, std::min(seq.num_remaining(), budget.tokens), budget);
  if (count == 0) {
    return false;
  }
  if (!reserve(seq, seq.num_planned + count, false)) {
    // An empty step frees no pages, now or later: then the younger must give theirs. Beside the
    // lane somebody decodes.
    const bool is_stuck = step.rows.empty() && in_flight_.empty() && !step.is_lane;
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
  if (num_scores(seq, count) > budget.samples) {
    const int32_t first = std::max(seq.num_planned, seq.num_prompt_scored);
    count = first + budget.samples - seq.num_planned;
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
  // A prompt's last token is none of them, also where a chunk or the prefix cache leaves it alone:
  // a GPU multiplies prompts in other arithmetic, and an answer must not depend on that.
  const auto is_decode_row = [](const Row& row) {
    return row.count == 1 && row.has_token && row.first >= row.seq->prompt_len;
  };
  std::stable_partition(step.rows.begin(), step.rows.end(), is_decode_row);
  for (Row& row : step.rows) {
    Sequence& seq = *row.seq;
    writer.add_row(seq, row.count);
    row.first_sample = out->num_samples;
    out->num_decode_rows += is_decode_row(row) ? 1 : 0;
    const bool is_decode = row.first >= seq.prompt_len && row.count == 1;
    (is_decode ? step.num_decode_tokens : step.num_prefill_tokens) += row.count;
    if (row.num_scores > 0) {
      const int32_t begin = std::max(row.first, seq.num_prompt_scored);
      for (int32_t p = begin; p < begin + row.num_scores; ++p) {
        writer.add_sample(seq, p, seq.tokens[static_cast<size_t>(p) + 1]);
      }
      seq.num_prompt_scored = begin + row.num_scores;
    }
    seq.num_planned = row.first + row.count;
    if (row.has_token) {
      seq.pending_row = writer.add_sample(seq, seq.num_planned - 1, -1);
      seq.num_pending += 1;
    }
  }
  step.num_samples = out->num_samples;
  writer.add_copies(copies_out_, copies_in_);
  writer.finish(step.id);
}

}  // namespace kt::sched
