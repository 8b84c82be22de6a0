// The scheduler behind the C ABI: argument checks, the hand-over from submitting threads to the
// engine thread, and the poisoned state after a broken invariant.
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/error.h"
#include "base/ring.h"
#include "kt.h"
#include "sched/journal.h"
#include "sched/scheduler.h"

namespace {

// One message of a submitting thread: a new sequence, or the id of one to cancel.
struct Message {
  std::unique_ptr<kt::sched::Sequence> seq;
  uint64_t cancel_id = 0;
};

}  // namespace

// DESIGN
//  core        engine thread only.
//  ring        its lock also guards living, num_waiting, counters and the journal: submit refuses a
//              living id and a full queue without waiting for the engine, which updates them after
//              plan and commit.
struct kt_sched {
  explicit kt_sched(const kt_sched_config& c) : config(c), core(c) { stats = core.stats(); }

  bool has_journal() const { return (config.flags & KT_SCHED_JOURNAL) != 0; }

  const kt_sched_config config;
  kt::sched::Scheduler core;
  std::vector<Message> taken;  // engine thread's scratch
  bool is_poisoned = false;    // engine thread
  uint64_t plan_ns = 0;        // engine thread
  uint64_t commit_ns = 0;      // engine thread

  kt::Ring<Message> ring;
  std::unordered_set<uint64_t> living;  // submitted and not ended
  int32_t num_waiting = 0;              // never admitted yet
  uint64_t num_rejected = 0;
  kt_sched_stats stats = {};
  kt::sched::Journal journal;
};

namespace {

using kt::guard;

void publish(kt_sched& s) {
  const std::vector<uint64_t> ended = s.core.take_ended();
  const int32_t dequeued = s.core.take_dequeued();
  kt_sched_stats stats = s.core.stats();
  stats.plan_ns = s.plan_ns;
  stats.commit_ns = s.commit_ns;
  s.ring.locked([&] {
    for (const uint64_t id : ended) {
      s.living.erase(id);
    }
    s.num_waiting -= dequeued;
    s.stats = stats;
  });
}

// Runs an engine-thread call; anything but a refused argument or order of calls breaks the handle.
template <class Body>
int32_t run(kt_sched* s, Body&& body) {
  return guard([&] {
    kt::require_handle(s, "sched");
    if (s->is_poisoned) {
      kt::fail_internal("the scheduler has failed before");
    }
    try {
      return body(*s);
    } catch (const kt::Error& error) {
      s->is_poisoned = error.status == KT_ERR_INTERNAL;
      throw;
    } catch (...) {
      s->is_poisoned = true;
      throw;
    }
  });
}

// Adds the time until its end to a total.
class Stopwatch {
 public:
  explicit Stopwatch(uint64_t* total) : total_(total) {}
  ~Stopwatch() {
    *total_ += static_cast<uint64_t>(
        std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin_).count());
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  uint64_t* total_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

template <class Record>
void record(kt_sched& s, Record&& add) {
  if (s.has_journal()) {
    s.ring.locked([&] { add(s.journal); });
  }
}

void take_messages(kt_sched& s) {
  s.ring.take_all(s.taken);
  for (Message& message : s.taken) {
    record(s, [&](kt::sched::Journal& journal) {
      message.seq ? journal.submit(*message.seq) : journal.cancel(message.cancel_id);
    });
    if (message.seq) {
      s.core.add(std::move(message.seq));
    } else {
      s.core.cancel(message.cancel_id);
    }
  }
}

// The calls that exist for ordinary steps and for the lane, and their names in the journal.
struct Track {
  void (kt::sched::Scheduler::*require_plannable)() const;
  int32_t (kt::sched::Scheduler::*plan)(int64_t, void*, kt_plan*);
  void (kt::sched::Scheduler::*commit)(int64_t, const int32_t*, int32_t);
  void (kt::sched::Scheduler::*fail)(int64_t);
  const char* plan_name;
  const char* commit_name;
  const char* fail_name;
};

using kt::sched::Scheduler;
constexpr Track kOrdinary = {&Scheduler::require_plannable,
                             &Scheduler::plan,
                             &Scheduler::commit,
                             &Scheduler::fail,
                             "plan",
                             "commit",
                             "fail"};
constexpr Track kLane = {&Scheduler::require_lane_plannable,
                         &Scheduler::plan_lane,
                         &Scheduler::commit_lane,
                         &Scheduler::fail_lane,
                         "lane_plan",
                         "lane_commit",
                         "lane_fail"};

int32_t plan(kt_sched* sched, int64_t now_ns, void* block, kt_plan* out, const Track& track) {
  return run(sched, [&](kt_sched& s) {
    kt::require_handle(block, "block");
    kt::require_struct(out, "out");
    (s.core.*track.require_plannable)();
    int32_t status = KT_OK;
    {
      const Stopwatch watch(&s.plan_ns);
      take_messages(s);
      status = (s.core.*track.plan)(now_ns, block, out);
    }
    record(s, [&](kt::sched::Journal& journal) {
      const bool is_idle = status == KT_IDLE;
      journal.plan(track.plan_name, now_ns, status,
                   is_idle ? 0 : kt::sched::plan_digest(s.core.layout(), *out, block));
    });
    publish(s);
    return status;
  });
}

int32_t commit(kt_sched* sched, int64_t now_ns, const int32_t* tokens, int32_t num_samples,
               const Track& track) {
  return run(sched, [&](kt_sched& s) {
    {
      const Stopwatch watch(&s.commit_ns);
      (s.core.*track.commit)(now_ns, tokens, num_samples);
    }
    record(s, [&](kt::sched::Journal& journal) {
      journal.commit(track.commit_name, now_ns, tokens, num_samples);
    });
    publish(s);
    return KT_OK;
  });
}

int32_t fail(kt_sched* sched, int64_t now_ns, const Track& track) {
  return run(sched, [&](kt_sched& s) {
    (s.core.*track.fail)(now_ns);
    record(s, [&](kt::sched::Journal& journal) { journal.fail(track.fail_name, now_ns); });
    publish(s);
    return KT_OK;
  });
}

}  // namespace

extern "C" {

int32_t kt_sched_create(const kt_sched_config* config, kt_sched** out) {
  return guard([&] {
    kt::require_handle(out, "out");
    kt::require_struct(config, "config");
    kt::sched::check_config(*config);
    *out = new kt_sched(*config);
    return KT_OK;
  });
}

int32_t kt_sched_destroy(kt_sched* sched) {
  delete sched;
  return KT_OK;
}

int32_t kt_sched_layout(const kt_sched* sched, kt_block_layout* out) {
  return guard([&] {
    kt::require_handle(sched, "sched");
    kt::require_struct(out, "out");
    *out = sched->core.layout();
    return KT_OK;
  });
}

int32_t kt_sched_submit(kt_sched* sched, const kt_request* request, int64_t now_ns) {
  return guard([&] {
    kt::require_handle(sched, "sched");
    kt::require_struct(request, "request");
    kt_sched& s = *sched;
    Message message;
    message.seq = kt::sched::make_sequence(s.config, *request, now_ns);
    const uint64_t seq_id = request->seq_id;
    bool is_known = false;
    const bool accepted = s.ring.push(std::move(message), [&] {
      is_known = s.living.count(seq_id) > 0;
      if (is_known) {
        return false;
      }
      if (s.num_waiting >= s.config.max_queue) {
        s.num_rejected += 1;
        return false;
      }
      s.living.insert(seq_id);
      s.num_waiting += 1;
      return true;
    });
    if (is_known) {
      kt::fail_argument("seq_id " + std::to_string(seq_id) + " names a living sequence");
    }
    return accepted ? KT_OK : KT_FULL;
  });
}

int32_t kt_sched_cancel(kt_sched* sched, uint64_t seq_id) {
  return guard([&] {
    kt::require_handle(sched, "sched");
    Message message;
    message.cancel_id = seq_id;
    // An unknown id would only wake the engine for nothing.
    sched->ring.push(std::move(message), [&] { return sched->living.count(seq_id) > 0; });
    return KT_OK;
  });
}

int32_t kt_sched_wait(kt_sched* sched, int64_t timeout_ns) {
  return run(sched, [&](kt_sched& s) {
    if (s.core.has_work()) {
      return KT_OK;
    }
    switch (s.ring.wait(timeout_ns)) {
      case kt::WaitResult::kReady:
        return KT_OK;
      case kt::WaitResult::kWoken:
        return KT_IDLE;
      default:
        return KT_TIMEOUT;
    }
  });
}

int32_t kt_sched_wake(kt_sched* sched) {
  return guard([&] {
    kt::require_handle(sched, "sched");
    sched->ring.wake();
    return KT_OK;
  });
}

int32_t kt_sched_plan(kt_sched* sched, int64_t now_ns, void* block, kt_plan* out) {
  return plan(sched, now_ns, block, out, kOrdinary);
}

int32_t kt_sched_commit(kt_sched* sched, int64_t now_ns, const int32_t* tokens,
                        int32_t num_samples) {
  return commit(sched, now_ns, tokens, num_samples, kOrdinary);
}

int32_t kt_sched_fail(kt_sched* sched, int64_t now_ns) { return fail(sched, now_ns, kOrdinary); }

int32_t kt_sched_plan_lane(kt_sched* sched, int64_t now_ns, void* block, kt_plan* out) {
  return plan(sched, now_ns, block, out, kLane);
}

int32_t kt_sched_commit_lane(kt_sched* sched, int64_t now_ns, const int32_t* tokens,
                             int32_t num_samples) {
  return commit(sched, now_ns, tokens, num_samples, kLane);
}

int32_t kt_sched_fail_lane(kt_sched* sched, int64_t now_ns) { return fail(sched, now_ns, kLane); }

int32_t kt_sched_drain(kt_sched* sched, kt_event* events, int32_t capacity, int32_t* num_events) {
  return run(sched, [&](kt_sched& s) {
    kt::require_handle(num_events, "num_events");
    if (capacity < 0) {
      kt::fail_argument("capacity is " + std::to_string(capacity));
    }
    if (capacity > 0) {
      kt::require_handle(events, "events");
    }
    *num_events = s.core.drain(events, capacity);
    return s.core.has_events() ? KT_FULL : KT_OK;
  });
}

int32_t kt_sched_query(kt_sched* sched, kt_sched_stats* out) {
  return guard([&] {
    kt::require_handle(sched, "sched");
    kt::require_struct(out, "out");
    sched->ring.locked([&] {
      *out = sched->stats;
      out->rejected = sched->num_rejected;
      // Sequences that the engine has not taken over yet are waiting too.
      out->num_waiting = sched->num_waiting + out->num_preempted;
    });
    return KT_OK;
  });
}

int32_t kt_sched_journal(kt_sched* sched, char* text, int64_t capacity, int64_t* num_bytes) {
  return guard([&] {
    kt::require_handle(sched, "sched");
    kt::require_handle(text, "text");
    kt::require_handle(num_bytes, "num_bytes");
    if (capacity < 0) {
      kt::fail_argument("capacity is " + std::to_string(capacity));
    }
    bool is_empty = true;
    sched->ring.locked([&] {
      *num_bytes = sched->journal.drain(text, capacity);
      is_empty = sched->journal.is_empty();
    });
    return is_empty ? KT_OK : KT_FULL;
  });
}

int32_t kt_sched_check(kt_sched* sched) {
  return run(sched, [&](kt_sched& s) {
    if (const char* wrong = s.core.check()) {
      kt::fail_internal(wrong);
    }
    return KT_OK;
  });
}

}  // extern "C"
