#include "host/workers.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "host/features.h"

namespace kt {
namespace {

// After a job the next one usually follows within this time during decoding; longer spinning takes
// the core from the event loop on small machines.
constexpr int64_t kIdleSpinNs = 100'000;
// After a started job the next one follows when a GPU has done its part of a layer. Waking sixteen
// sleeping workers took 1.4 ms on a virtual machine, as long as their share of a short prompt's
// layer.
constexpr int64_t kStartedSpinNs = 5'000'000;
// Phases of one layer differ by a few microseconds when every worker has a core of its own.
constexpr int64_t kBarrierSpinNs = 50'000;
constexpr int kYields = 64;

struct Aborted {};  // thrown at a barrier when another worker failed

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr,
          0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr,
          nullptr, 0);
}

void check_config(const kt_pool_config& config) {
  const auto reject = [](const char* name, int32_t value, const char* limit) {
    fail_argument(std::string("kt_pool_config.") + name + " is " + std::to_string(value) +
                  ", allowed is " + limit);
  };
  if (config.num_threads < 0 || config.num_threads > 1024) {
    reject("num_threads", config.num_threads, "0 .. 1024");
  }
  if (config.spin_us < -1 || config.spin_us > 1'000'000) {
    reject("spin_us", config.spin_us, "-1 .. 1000000");
  }
  if (config.pin < 0 || config.pin > 1) {
    reject("pin", config.pin, "0 or 1");
  }
  if (config.fake_nodes < 0 || config.fake_nodes > 64) {
    reject("fake_nodes", config.fake_nodes, "0 .. 64");
  }
}

}  // namespace

Workers::Workers(const kt_pool_config& config) {
  check_config(config);
  isa_ = resolve_isa(config.isa);
  const Topology topology = read_topology();
  const auto num_cores = static_cast<int32_t>(topology.cores.size());
  num_threads_ = config.num_threads > 0 ? config.num_threads : default_threads(topology);
  idle_spin_ns_ = config.spin_us < 0 ? kIdleSpinNs : int64_t{1000} * config.spin_us;
  const bool oversubscribed = num_threads_ > topology.num_cpus;
  barrier_spin_ns_ = oversubscribed ? 0 : kBarrierSpinNs;
  pinned_ = config.pin != 0 && num_threads_ <= num_cores;
  // Only on cores of their own: whoever drives the GPU needs one too.
  started_spin_ns_ = pinned_ ? std::max(idle_spin_ns_, kStartedSpinNs) : idle_spin_ns_;

  // Fewer threads than cores are spread over the nodes in proportion, so that every memory
  // controller is used; workers keep the order of the cores, hence of the nodes.
  for (int32_t worker = 0; worker < num_threads_; ++worker) {
    const Range range = split(num_cores, worker, num_threads_);
    const Core& core =
        topology.cores[static_cast<size_t>(std::min<int64_t>(range.first, num_cores - 1))];
    cpus_.push_back(pinned_ ? core.cpu : -1);
    nodes_.push_back(core.node);
  }
  if (config.fake_nodes > 0) {
    const int32_t pretended = std::min(config.fake_nodes, num_threads_);
    for (int32_t worker = 0; worker < num_threads_; ++worker) {
      nodes_[static_cast<size_t>(worker)] = worker * pretended / num_threads_;
    }
  }
  // Renumber: a node that got no worker owns nothing.
  num_nodes_ = 0;
  for (int32_t worker = 0; worker < num_threads_; ++worker) {
    const bool first = worker == 0 || nodes_[static_cast<size_t>(worker)] !=
                                          nodes_[static_cast<size_t>(worker) - 1];
    if (first) {
      node_workers_.push_back({worker, worker});
    }
    ++node_workers_.back().last;
  }
  num_nodes_ = static_cast<int32_t>(node_workers_.size());
  for (int32_t node = 0; node < num_nodes_; ++node) {
    const Range range = workers_of(node);
    for (int64_t w = range.first; w < range.last; ++w) {
      nodes_[static_cast<size_t>(w)] = node;
    }
  }

  for (int32_t worker = 1; worker < num_threads_; ++worker) {
    threads_.emplace_back([this, worker] { thread_main(worker); });
    pin(worker, cpus_[static_cast<size_t>(worker)]);
  }
  CPU_ZERO(&others_cpus_);
  for (int32_t worker = 1; worker < num_threads_; ++worker) {
    const int32_t cpu = cpus_[static_cast<size_t>(worker)];
    if (cpu >= 0 && cpu < CPU_SETSIZE && cpu != cpus_[0]) {
      CPU_SET(cpu, &others_cpus_);
    }
  }
}

Workers::~Workers() {
  stop_ = true;
  epoch_.word.fetch_add(1);
  wake(epoch_);
  if (stand_in_.joinable()) {
    first_.word.fetch_add(1);
    wake(first_);
    stand_in_.join();
  }
  for (std::thread& thread : threads_) {
    thread.join();
  }
}

// Worker 0 is the caller's thread and keeps the caller's affinity: threads it starts later would
// inherit a narrower one.
void Workers::pin(int32_t worker, int32_t cpu) {
  if (cpu < 0) {
    return;
  }
  cpu_set_t* set = CPU_ALLOC(static_cast<size_t>(cpu) + 1);
  if (set == nullptr) {
    return;
  }
  const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(cpu) + 1);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(static_cast<size_t>(cpu), bytes, set);
  std::thread& thread = threads_[static_cast<size_t>(worker) - 1];
  const int failed = pthread_setaffinity_np(thread.native_handle(), bytes, set);
  if (failed != 0) {
    cpus_[static_cast<size_t>(worker)] = -1;  // shown by describe()
  }
  CPU_FREE(set);
}

// Worker 0 keeps its affinity, so the system may have put it on the core of a pinned worker, which
// cannot move: each phase then takes as long as one of the two spins before it lets the other run
// (measured: 160 us for a layer instead of 2, and the system left it so for half a second). The
// affinity is narrowed for the move only.
void Workers::leave_others_cores() const {
  const int cpu = sched_getcpu();
  if (cpu < 0 || cpu >= CPU_SETSIZE || cpus_[0] >= CPU_SETSIZE || !CPU_ISSET(cpu, &others_cpus_)) {
    return;
  }
  cpu_set_t before;
  cpu_set_t own;
  CPU_ZERO(&own);
  CPU_SET(cpus_[0], &own);
  if (sched_getaffinity(0, sizeof(before), &before) == 0 && CPU_ISSET(cpus_[0], &before) &&
      sched_setaffinity(0, sizeof(own), &own) == 0) {
    sched_setaffinity(0, sizeof(before), &before);
  }
}

void Workers::wait_change(Gate& gate, uint32_t seen, int64_t spin_ns) const {
  if (spin_ns > 0) {
    const int64_t end = now_ns() + spin_ns;
    do {
      for (int i = 0; i < 32; ++i) {
        if (gate.word.load(std::memory_order_acquire) != seen) {
          return;
        }
        cpu_relax();
      }
    } while (now_ns() < end);
  }
  for (int i = 0; i < kYields; ++i) {
    if (gate.word.load(std::memory_order_acquire) != seen) {
      return;
    }
    sched_yield();
  }
  gate.sleepers.fetch_add(1);
  while (gate.word.load() == seen) {
    futex_wait(gate.word, seen);
  }
  gate.sleepers.fetch_sub(1);
}

void Workers::wake(Gate& gate) {
  if (gate.sleepers.load() != 0) {
    futex_wake_all(gate.word);
  }
}

void Workers::thread_main(int32_t worker) {
  uint32_t seen = 0;
  int64_t spin_ns = idle_spin_ns_;
  while (true) {
    wait_change(epoch_, seen, spin_ns);
    ++seen;  // a job ends only when every worker took part, so epochs are never skipped
    if (stop_) {
      return;
    }
    spin_ns = ticket_ == nullptr ? idle_spin_ns_ : started_spin_ns_;
    execute(worker);
    arrive();
  }
}

// The last one changes the word the caller waits for; it must not touch the job afterwards.
void Workers::arrive() {
  Ticket* const ticket = ticket_;
  if (arrived_.word.fetch_sub(1) != 1) {
    return;
  }
  if (ticket == nullptr) {
    wake(arrived_);
    return;
  }
  ticket->error = finish();
  ticket->ended.store(true);  // now it may be gone
  ends_.word.fetch_add(1);
  wake(ends_);
}

void Workers::stand_in_main() {
  uint32_t seen = 0;
  while (true) {
    wait_change(first_, seen, 0);
    ++seen;
    if (stop_) {
      return;
    }
    if (pinned_) {
      leave_others_cores();
    }
    execute(0);
    arrive();
  }
}

void Workers::execute(int32_t worker) noexcept {
  try {
    job_(context_, worker);
    return;
  } catch (const Aborted&) {
    return;  // somebody else's failure is already stored
  } catch (...) {
    if (!error_taken_.exchange(true)) {
      error_ = std::current_exception();
    }
  }
  aborted_.store(true);
  phase_.word.fetch_add(1);
  wake(phase_);
}

void Workers::run(Job job, void* context) {
  free_.acquire();
  if (pinned_) {
    leave_others_cores();
  }
  job_ = job;
  context_ = context;
  ticket_ = nullptr;
  parties_ = num_threads_;
  if (num_threads_ > 1) {
    arrived_.word.store(static_cast<uint32_t>(num_threads_ - 1));
    epoch_.word.fetch_add(1);
    wake(epoch_);
  }
  execute(0);
  while (true) {
    const uint32_t left = arrived_.word.load(std::memory_order_acquire);
    if (left == 0) {
      break;
    }
    wait_change(arrived_, left, barrier_spin_ns_);
  }
  if (std::exception_ptr error = finish(); error != nullptr) {
    std::rethrow_exception(error);
  }
}

void Workers::start(Job job, void* context, bool without_first, Ticket& ticket) {
  free_.acquire();
  const bool with_first = !without_first || num_threads_ == 1;
  if (with_first && !stand_in_.joinable()) {
    try {
      stand_in_ = std::thread([this] { stand_in_main(); });
    } catch (...) {
      free_.release();
      throw;
    }
  }
  job_ = job;
  context_ = context;
  ticket_ = &ticket;
  ticket.ended.store(false);
  parties_ = with_first ? num_threads_ : num_threads_ - 1;
  arrived_.word.store(static_cast<uint32_t>(parties_));
  epoch_.word.fetch_add(1);
  wake(epoch_);
  if (with_first) {
    first_.word.fetch_add(1);
    wake(first_);
  }
}

void Workers::join(Ticket& ticket) {
  for (uint32_t seen = ends_.word.load(); !ticket.ended.load(); seen = ends_.word.load()) {
    wait_change(ends_, seen, 0);
  }
  if (ticket.error != nullptr) {
    std::exception_ptr error;
    std::swap(error, ticket.error);
    std::rethrow_exception(error);
  }
}

// Lets the next job in; returns what this one threw.
std::exception_ptr Workers::finish() {
  std::exception_ptr error;
  if (aborted_.load()) {
    barrier_count_.store(0);
    aborted_.store(false);
    error_taken_.store(false);
    std::swap(error, error_);
  }
  free_.release();
  return error;
}

void Workers::barrier() {
  if (parties_ == 1) {
    return;
  }
  const uint32_t phase = phase_.word.load(std::memory_order_acquire);
  // Checked after reading the phase: a worker that aborts sets the flag before it bumps the phase,
  // so whoever read the bumped value sees the flag here instead of waiting for ever.
  if (aborted_.load()) {
    throw Aborted{};
  }
  const auto count = static_cast<uint32_t>(parties_);
  if (barrier_count_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    barrier_count_.store(0, std::memory_order_relaxed);
    phase_.word.fetch_add(1);
    wake(phase_);
    return;
  }
  wait_change(phase_, phase, barrier_spin_ns_);
  if (aborted_.load()) {
    throw Aborted{};
  }
}

std::string Workers::describe() const {
  std::string text = std::to_string(num_threads_) + (num_threads_ == 1 ? " thread" : " threads") +
                     " on " + std::to_string(num_nodes_) + (num_nodes_ == 1 ? " node" : " nodes") +
                     ", " + isa_name(isa_) + (pinned_ ? ", pinned" : ", not pinned");
  for (int32_t node = 0; node < num_nodes_; ++node) {
    const Range range = workers_of(node);
    text += "; node " + std::to_string(node) + ": workers " + std::to_string(range.first) + "-" +
            std::to_string(range.last - 1);
    if (!pinned_) {
      continue;
    }
    text += " on cpus";
    for (int64_t w = range.first; w < range.last; ++w) {
      const int32_t cpu = cpus_[static_cast<size_t>(w)];
      text += w == 0 ? " any" : cpu < 0 ? " ?" : " " + std::to_string(cpu);
    }
  }
  return text;
}

}  // namespace kt
