// The pinned worker pool: runs one job on all workers at a time and gives it barriers.
//
// DESIGN
//  - The thread that calls run() is worker 0; num_threads() - 1 more threads live as long as the
//    pool. A job is a plain function and a pointer, published by bumping an epoch word; nothing is
//    allocated or locked while it runs (run() takes one mutex so that two callers queue up).
//  - Waiting, for a job or at a barrier: spin with `pause`, then give the core away with
//    sched_yield, then sleep on a futex. The middle step matters on shared or virtual cores, where
//    the thread we wait for may be the one that needs our core. An idle pool sleeps: 0 % CPU.
//  - Lost wake-ups cannot happen: a sleeper announces itself (sleepers += 1) before the futex call
//    re-checks the word, and a waker changes the word before it reads the announcement; both use
//    sequentially consistent operations.
//  - start() publishes a job and returns: worker 0 is then left out, or a thread of the pool stands
//  in
//    for it, made when it is first needed. Only one job is there at a time, whoever runs it.
//  - A worker that throws aborts the job: everybody waiting at a barrier leaves through an
//    exception as well, and run() rethrows the first one on the caller's thread.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "host/topology.h"
#include "kt.h"

namespace kt {

struct Range {
  int64_t first = 0;
  int64_t last = 0;  // one past the end
};

// Part `index` of `parts` nearly equal pieces of [0, count).
inline Range split(int64_t count, int64_t index, int64_t parts) {
  return {count * index / parts, count * (index + 1) / parts};
}

class Workers {
 public:
  using Job = void (*)(void* context, int32_t worker);
  struct Ticket {  // of a job that was started
    std::atomic<bool> ended{false};
    std::exception_ptr error;
  };

  explicit Workers(const kt_pool_config& config);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Runs job(context, worker) for every worker and returns when all have finished. [any]
  void run(Job job, void* context);
  // run() for a callable: for_each([&](int32_t worker) { ... }).
  template <class Body>
  void for_each(Body&& body) {
    run([](void* context, int32_t worker) { (*static_cast<Body*>(context))(worker); }, &body);
  }
  // Begins job(context, worker) on other threads and returns; `without_first` leaves worker 0 out,
  // where there are others. The next job may begin when this one ends, joined or not. context and
  // ticket must live until join(). [any]
  void start(Job job, void* context, bool without_first, Ticket& ticket);
  // Sleeps until the job has ended and rethrows its failure.
  void join(Ticket& ticket);
  // Inside a job only, by every worker that takes part equally often.
  void barrier();

  int32_t num_threads() const { return num_threads_; }
  int32_t num_nodes() const { return num_nodes_; }
  int32_t isa() const { return isa_; }
  // The core that is left to worker 0, the caller; -1 when the workers are not pinned.
  int32_t caller_cpu() const { return pinned_ ? cpus_[0] : -1; }
  int32_t node_of(int32_t worker) const { return nodes_[static_cast<size_t>(worker)]; }
  // Workers of a node are numbered consecutively.
  Range workers_of(int32_t node) const { return node_workers_[static_cast<size_t>(node)]; }
  std::string describe() const;

 private:
  struct alignas(64) Gate {  // a word to wait for, on a cache line of its own
    std::atomic<uint32_t> word{0};
    std::atomic<uint32_t> sleepers{0};
  };

  void thread_main(int32_t worker);
  void stand_in_main();
  void arrive();
  std::exception_ptr finish();
  void execute(int32_t worker) noexcept;
  void wait_change(Gate& gate, uint32_t seen, int64_t spin_ns) const;
  static void wake(Gate& gate);
  void pin(int32_t worker, int32_t cpu);
  void leave_others_cores() const;

  int32_t num_threads_ = 1;
  int32_t num_nodes_ = 1;
  int32_t isa_ = 0;
  int64_t idle_spin_ns_ = 0;
  int64_t started_spin_ns_ = 0;  // after a started job
  int64_t barrier_spin_ns_ = 0;
  bool pinned_ = false;
  std::vector<int32_t> cpus_;   // core of each worker; -1 = anywhere
  cpu_set_t others_cpus_;       // cores of the pinned workers but worker 0
  std::vector<int32_t> nodes_;  // node of each worker
  std::vector<Range> node_workers_;
  std::vector<std::thread> threads_;
  std::thread stand_in_;           // for worker 0 in jobs that were started
  std::binary_semaphore free_{1};  // no job is there

  alignas(64) Job job_ = nullptr;  // written by worker 0 before epoch_ changes
  void* context_ = nullptr;
  int32_t parties_ = 1;       // workers that take part
  Ticket* ticket_ = nullptr;  // of a started job
  bool stop_ = false;
  Gate epoch_;    // bumped once per job
  Gate first_;    // bumped once per job of the stand-in
  Gate arrived_;  // workers that have not finished the job yet; its word reaches 0
  Gate phase_;    // bumped when a barrier opens
  Gate ends_;     // bumped when a started job ends
  alignas(64) std::atomic<uint32_t> barrier_count_{0};
  alignas(64) std::atomic<bool> aborted_{false};
  std::atomic<bool> error_taken_{false};
  std::exception_ptr error_;
};

}  // namespace kt

// The public handle.
struct kt_pool {
  explicit kt_pool(const kt_pool_config& config) : workers(config) {}
  kt::Workers workers;
  // Work area of kt_experts_multiply, kept between calls; its type is that file's business.
  std::shared_ptr<void> expert_memory;
  // The same for kt_matrix_multiply.
  std::shared_ptr<void> matrix_memory;
  std::mutex matrix_lock;
  std::mutex expert_lock;
};
