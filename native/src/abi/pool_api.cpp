// The pool's handle and the measurement of the machine's read bandwidth.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/arena.h"
#include "base/error.h"
#include "host/workers.h"
#include "kt.h"

namespace {

// Lowered to the widest registers of the baseline; one core's share of DRAM is far below what even
// 16-byte loads reach.
using Line = uint64_t __attribute__((vector_size(64), aligned(64), may_alias));

// Sums a buffer; kAhead > 0 asks for lines that many bytes ahead, into L2: a prefetch into L1 holds
// one of its few miss buffers until DRAM answers.
template <int64_t kAhead>
uint64_t read_all(const uint8_t* data, int64_t num_bytes) {
  Line sum[4] = {};
  const auto* lines = reinterpret_cast<const Line*>(data);
  const int64_t count = num_bytes / 64;
  for (int64_t i = 0; i + 4 <= count; i += 4) {
    for (int64_t j = 0; j < 4; ++j) {
      if (kAhead > 0) {
        __builtin_prefetch(data + (i + j) * 64 + kAhead, 0, 2);
      }
      sum[j] += lines[i + j];
    }
  }
  const Line all = sum[0] + sum[1] + sum[2] + sum[3];
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) {
    total += all[i];
  }
  return total;
}

// Which way of reading is fastest differs between CPUs and with the load of the machine: every pass
// tries all, the best counts.
using Reader = uint64_t (*)(const uint8_t*, int64_t);
constexpr Reader kReaders[] = {read_all<0>, read_all<1024>, read_all<8192>};

double bench_read(kt::Workers& workers, int64_t num_bytes, int32_t passes) {
  kt::Arena arena;
  uint8_t* data = arena.allocate(num_bytes);
  const int64_t lines = num_bytes / 4096;
  const auto part = [&](int32_t worker) {
    const kt::Range range = kt::split(lines, worker, workers.num_threads());
    return kt::Range{range.first * 4096, range.last * 4096};
  };
  // Written by the thread that will read it: first touch decides the node of every page.
  workers.for_each([&](int32_t worker) {
    const kt::Range range = part(worker);
    std::memset(data + range.first, 1, static_cast<size_t>(range.last - range.first));
  });
  std::atomic<uint64_t> sink{0};
  double best = 0;
  constexpr int32_t kNumReaders = 3;
  for (int32_t pass = 0; pass < passes * kNumReaders; ++pass) {
    const Reader read = kReaders[pass % kNumReaders];
    const auto start = std::chrono::steady_clock::now();
    workers.for_each([&](int32_t worker) {
      const kt::Range range = part(worker);
      sink.fetch_add(read(data + range.first, range.last - range.first));
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(lines * 4096) / seconds.count());
  }
  // Every byte is 1, so the sum is known: the reads cannot have been optimised away.
  const uint64_t expected = static_cast<uint64_t>(lines) * 512 * 0x0101010101010101ull *
                            static_cast<uint64_t>(passes) * static_cast<uint64_t>(kNumReaders);
  if (sink.load() != expected) {
    kt::fail_internal("kt_bench_read: the data read back is wrong");
  }
  return best;
}

}  // namespace

extern "C" {

int32_t kt_pool_create(const kt_pool_config* config, kt_pool** out) {
  return kt::guard([&] {
    kt::require_struct(config, "kt_pool_config");
    kt::require_handle(out, "out");
    *out = nullptr;
    *out = new kt_pool(*config);
    return KT_OK;
  });
}

int32_t kt_pool_destroy(kt_pool* pool) {
  return kt::guard([&] {
    delete pool;
    return KT_OK;
  });
}

int32_t kt_pool_caller_cpu(const kt_pool* pool, int32_t* cpu) {
  return kt::guard([&] {
    kt::require_handle(pool, "pool");
    kt::require_handle(cpu, "cpu");
    *cpu = pool->workers.caller_cpu();
    return KT_OK;
  });
}

int32_t kt_pool_describe(const kt_pool* pool, char* text, int32_t capacity) {
  return kt::guard([&] {
    kt::require_handle(pool, "pool");
    kt::require_handle(text, "text");
    if (capacity < 1) {
      kt::fail_argument("capacity is " + std::to_string(capacity) + ", at least 1");
    }
    const std::string line = pool->workers.describe();
    const size_t length = std::min(line.size(), static_cast<size_t>(capacity) - 1);
    std::memcpy(text, line.data(), length);
    text[length] = '\0';
    return KT_OK;
  });
}

int32_t kt_bench_read(kt_pool* pool, int64_t num_bytes, int32_t passes, double* bytes_per_second) {
  return kt::guard([&] {
    kt::require_handle(pool, "pool");
    kt::require_handle(bytes_per_second, "bytes_per_second");
    const int64_t least = int64_t{4096} * pool->workers.num_threads();
    if (num_bytes < least) {
      kt::fail_argument("num_bytes is " + std::to_string(num_bytes) + ", at least " +
                        std::to_string(least));
    }
    if (passes < 1 || passes > 1000) {
      kt::fail_argument("passes is " + std::to_string(passes) + ", allowed is 1 .. 1000");
    }
    *bytes_per_second = bench_read(pool->workers, num_bytes, passes);
    return KT_OK;
  });
}

}  // extern "C"
