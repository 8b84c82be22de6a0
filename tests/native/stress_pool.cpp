// Stress driver of the worker pool, for ThreadSanitizer.
//
// tests/native/test_stress.py compiles this file with the pool's sources under a sanitizer and runs
// it. Exits 0 when every job gave the expected counts; a race makes the sanitizer exit with 66.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/error.h"
#include "experts/tasks.h"
#include "host/workers.h"
#include "kt.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) {
    return;
  }
  std::fprintf(stderr, "failed: %s\n", what);
  ++failures;
}

kt_pool_config config_of(int32_t threads, int32_t spin_us, int32_t nodes) {
  kt_pool_config config = {};
  config.struct_size = sizeof(config);
  config.num_threads = threads;
  config.isa = KT_ISA_SCALAR;
  config.spin_us = spin_us;
  config.fake_nodes = nodes;
  return config;
}

// Plain (non-atomic) data handed from phase to phase: correct only if the barrier orders it.
void barriers(kt::Workers& workers, int rounds) {
  const auto count = static_cast<size_t>(workers.num_threads());
  std::vector<int64_t> values(count, 1);
  std::vector<int64_t> sums(count, 0);
  workers.for_each([&](int32_t worker) {
    const auto w = static_cast<size_t>(worker);
    for (int round = 0; round < rounds; ++round) {
      values[w] = round + worker;
      workers.barrier();
      int64_t sum = 0;
      for (const int64_t value : values) {
        sum += value;
      }
      sums[w] = sum;
      workers.barrier();
    }
  });
  const auto n = static_cast<int64_t>(count);
  for (const int64_t sum : sums) {
    expect(sum == n * (rounds - 1) + n * (n - 1) / 2, "barrier sum");
  }
}

// Every element of a shared range is visited once, whatever the stealing does.
void shared_ranges(kt::Workers& workers, int rounds) {
  constexpr int64_t kCount = 1000;
  std::vector<int32_t> visits(kCount);
  for (int round = 0; round < rounds; ++round) {
    kt::TailCounter tail;
    std::fill(visits.begin(), visits.end(), 0);
    const int64_t unit = 1 + round % 9;
    workers.for_each([&](int32_t worker) {
      kt::share_range(kCount, unit, worker, workers.num_threads(), 1 + round % 7, tail,
                      [&](int64_t first, int64_t last) {
                        for (int64_t i = first; i < last; ++i) {
                          ++visits[static_cast<size_t>(i)];
                        }
                      });
    });
    for (const int32_t visit : visits) {
      expect(visit == 1, "visited once");
    }
  }
}

// A worker that throws ends the job for all, also for those at a barrier; the pool stays usable.
void failing_jobs(kt::Workers& workers, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    bool caught = false;
    try {
      workers.for_each([&](int32_t worker) {
        if (worker == round % workers.num_threads()) {
          throw std::runtime_error("expected");
        }
        workers.barrier();
      });
    } catch (const std::runtime_error& error) {
      caught = std::strcmp(error.what(), "expected") == 0;
    }
    expect(caught, "failure reported");
  }
  barriers(workers, 10);
}

void two_callers(kt::Workers& workers, int rounds) {
  std::atomic<int64_t> total{0};
  const auto call = [&] {
    for (int round = 0; round < rounds; ++round) {
      workers.for_each([&](int32_t) { total.fetch_add(1); });
    }
  };
  std::thread other(call);
  call();
  other.join();
  expect(total.load() == int64_t{2} * rounds * workers.num_threads(), "two callers");
}

// Jobs that run beside this thread: joined late or after another job; with and without worker 0;
// a failure is the joiner's, and the next job finds the pool in order.
void started_jobs(kt::Workers& workers, int rounds) {
  struct Work {
    kt::Workers& workers;
    std::vector<int64_t> values;  // plain data: the join orders it
    int32_t fails = -1;
  };
  const int32_t threads = workers.num_threads();
  const auto job = [](void* context, int32_t worker) {
    auto& work = *static_cast<Work*>(context);
    if (worker == work.fails) {
      throw std::runtime_error("expected");
    }
    work.values[static_cast<size_t>(worker)] += 1;
    work.workers.barrier();
    work.values[static_cast<size_t>(worker)] += 1;
  };
  for (int round = 0; round < rounds; ++round) {
    const bool without_first = round % 2 == 1 && threads > 1;
    Work work{workers, std::vector<int64_t>(static_cast<size_t>(threads))};
    work.fails = round % 5 == 4 ? threads - 1 : -1;
    kt::Workers::Ticket ticket;
    workers.start(job, &work, without_first, ticket);
    if (round % 3 == 0) {
      barriers(workers, 3);  // waits for the pool, not for the join
    }
    bool caught = false;
    try {
      workers.join(ticket);
    } catch (const std::runtime_error&) {
      caught = true;
    }
    expect(caught == (work.fails >= 0), "failure of a started job");
    for (size_t worker = 0; !caught && worker < work.values.size(); ++worker) {
      const int64_t expected = worker == 0 && without_first ? 0 : 2;
      expect(work.values[worker] == expected, "both phases");
    }
  }
}

}  // namespace

int main() {
  for (const int32_t threads : {1, 2, 3, 8}) {
    for (const int32_t spin_us : {0, 50}) {
      kt::Workers workers(config_of(threads, spin_us, threads / 2));
      barriers(workers, 300);
      shared_ranges(workers, 30);
      failing_jobs(workers, 30);
      two_callers(workers, 100);
      started_jobs(workers, 100);
    }
  }
  for (int i = 0; i < 50; ++i) {
    kt::Workers workers(config_of(4, i % 2, 0));
    if (i % 3 == 0) {
      barriers(workers, 2);
    }
  }
  if (failures == 0) {
    std::puts("ok");
  }
  return failures == 0 ? 0 : 1;
}
