// Entry and exit of sequences, statistics and the invariant check; see plan.cpp, paging.cpp and
// commit.cpp for the rest.
#include "sched/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace kt::sched {
namespace {

constexpr int64_t kDefaultPriorityStepNs = 10'000'000'000;

// A tree for which no memory is spent when there is no prefix cache.
PrefixTree make_tree(const kt_sched_config& c) {
  if ((c.flags & KT_SCHED_PREFIX_CACHE) == 0) {
    return {0, 0, c.page_size};
  }
  return {c.num_pages, c.num_host_pages, c.page_size};
}

}  // namespace

Scheduler::Scheduler(const kt_sched_config& config)
    : config_(config),
      layout_(block_layout(config)),
      capacity_(block_capacity(config)),
      pool_(config.num_pages),
      host_pool_(config.num_host_pages),
      tree_(make_tree(config)) {
  if (config_.watermark_pages < 0) {
    config_.watermark_pages = std::max(1, config_.num_pages / 100);
  }
  if (config_.priority_step_ns == 0) {
    config_.priority_step_ns = kDefaultPriorityStepNs;
  }
  counters_.struct_size = sizeof(counters_);
  counters_.pages_total = config.num_pages;
  counters_.host_pages_total = config.num_host_pages;
}

void Scheduler::add(std::unique_ptr<Sequence> owned) {
  Sequence& seq = *owned;
  // Submitting threads may read their clocks in another order than they arrive here.
  last_submit_ns_ = std::max(last_submit_ns_, seq.submit_ns);
  seq.submit_ns = last_submit_ns_;
  seq.key = {seq.submit_ns - seq.priority * config_.priority_step_ns, num_arrived_++};
  waiting_.emplace(seq.key, &seq);
  if (config_.queue_timeout_ns > 0) {
    arrivals_.emplace_back(seq.seq_id, seq.key.arrival);
  }
  living_.emplace(seq.seq_id, std::move(owned));
  counters_.submitted += 1;
}

void Scheduler::cancel(uint64_t seq_id) {
  const auto it = living_.find(seq_id);
  if (it == living_.end() || it->second->lane_end != KT_FINISH_NONE) {
    return;
  }
  counters_.cancelled += 1;
  end(*it->second, KT_FINISH_CANCELLED);
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
  stats.num_preempted = num_preempted_;
  stats.pages_free = pool_.num_free();
  stats.pages_cached = tree_.num_idle();
  stats.pages_used = stats.pages_total - stats.pages_free - stats.pages_cached;
  stats.host_pages_used = host_pool_.num_pages() - host_pool_.num_free();
  return stats;
}

const char* Scheduler::check() const {
  if (living_.size() != waiting_.size() + running_.size()) {
    return "a sequence is lost";
  }
  if (running_.size() > static_cast<size_t>(config_.max_batch_size)) {
    return "too many running";
  }
  for (const Row& row : lane_ ? lane_->rows : std::vector<Row>()) {
    if (row.seq == nullptr || !row.seq->is_in_lane || !row.seq->is_running ||
        row.admission != row.seq->admissions || row.seq->num_planned != row.first + row.count) {
      return "a sequence of the lane has changed";
    }
  }
  size_t num_in_lane = 0;
  for (const auto& [id, seq] : living_) {
    num_in_lane += seq->is_in_lane ? 1 : 0;
  }
  if (num_in_lane != (lane_ ? lane_->rows.size() : 0)) {
    return "a sequence thinks it is in the lane";
  }
  int32_t num_preempted = 0;
  for (const auto& [key, seq] : waiting_) {
    if (seq->is_running || !seq->pages.empty() || !seq->nodes.empty() || seq->num_planned != 0) {
      return "a waiting sequence has pages";
    }
    num_preempted += seq->admissions > 0 ? 1 : 0;
  }
  if (num_preempted != num_preempted_) {
    return "the number of preempted sequences is wrong";
  }
  for (size_t i = 0; i < running_.size(); ++i) {
    const Sequence& seq = *running_[i];
    if (!seq.is_running) {
      return "a running sequence says it waits";
    }
    if (i > 0 && !(running_[i - 1]->key < seq.key)) {
      return "running sequences are out of order";
    }
    if (seq.num_planned > static_cast<int32_t>(seq.pages.size()) * config_.page_size) {
      return "planned tokens have no page";
    }
    if (seq.nodes.size() > seq.pages.size()) {
      return "a sequence has more nodes than pages";
    }
    if (seq.num_generated() > seq.max_tokens) {
      return "a sequence has too many tokens";
    }
  }
  return check_pages();
}

}  // namespace kt::sched
