// Concurrent submit, cancel, wake and query against a running engine thread: `sched_threads
// [COUNT]` requests per client thread. Built with the thread sanitizer by `make fuzz`. Exit
// status 1 when a request gets no end, two ends, or too many tokens.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "kt.h"

namespace {

constexpr int kNumClients = 3;

void require(bool condition, const char* what) {
  if (condition) {
    return;
  }
  std::printf("failed: %s: %s\n", what, kt_last_error());
  std::exit(1);
}

struct Shared {
  kt_sched* sched = nullptr;
  std::atomic<int64_t> accepted{0};
  std::atomic<int> num_done{0};
};

void client(Shared& shared, int number, int count) {
  std::mt19937 random(static_cast<unsigned>(number));
  std::vector<int32_t> prompt(64);
  for (auto& token : prompt) {
    token = static_cast<int32_t>(random() % 50);
  }
  for (int i = 0; i < count; ++i) {
    kt_request request = {};
    request.struct_size = sizeof(request);
    request.num_tokens = 1 + static_cast<int32_t>(random() % 64);
    request.tokens = prompt.data();
    request.seq_id = static_cast<uint64_t>(number) * 1000000 + static_cast<uint64_t>(i) + 1;
    request.max_tokens = static_cast<int32_t>(random() % 6);
    request.top_p = 1;
    request.repetition_penalty = random() % 4 == 0 ? 1.1F : 1;
    request.num_logprobs = request.prompt_logprobs = -1;
    const int32_t status = kt_sched_submit(shared.sched, &request, i);
    require(status == KT_OK || status == KT_FULL, "submit");
    shared.accepted += status == KT_OK ? 1 : 0;
    if (random() % 3 == 0) {
      require(kt_sched_cancel(shared.sched, request.seq_id) == KT_OK, "cancel");
    }
    if (random() % 16 == 0) {
      kt_sched_stats stats = {};
      stats.struct_size = sizeof(stats);
      require(kt_sched_query(shared.sched, &stats) == KT_OK, "query");
      require(kt_sched_wake(shared.sched) == KT_OK, "wake");
    }
    if (status == KT_FULL) {
      std::this_thread::yield();
    }
  }
  shared.num_done += 1;
  kt_sched_wake(shared.sched);
}

// The engine thread: until every client is done and every accepted request has ended.
int64_t engine(Shared& shared) {
  kt_block_layout layout = {};
  layout.struct_size = sizeof(layout);
  require(kt_sched_layout(shared.sched, &layout) == KT_OK, "layout");
  std::vector<char> block(static_cast<size_t>(layout.num_bytes));
  const std::vector<int32_t> tokens(static_cast<size_t>(layout.max_samples), 7);
  std::map<uint64_t, int> ended;
  int64_t now = 1;
  while (shared.num_done < kNumClients || static_cast<int64_t>(ended.size()) < shared.accepted) {
    require(kt_sched_wait(shared.sched, 1'000'000) >= 0, "wait");
    kt_plan plan = {};
    plan.struct_size = sizeof(plan);
    const int32_t status = kt_sched_plan(shared.sched, ++now, block.data(), &plan);
    require(status == KT_OK || status == KT_IDLE, "plan");
    if (status == KT_OK) {
      require(kt_sched_commit(shared.sched, ++now, tokens.data(), plan.num_samples) == KT_OK,
              "commit");
    }
    kt_event events[64];
    int32_t count = 0;
    do {
      require(kt_sched_drain(shared.sched, events, 64, &count) >= 0, "drain");
      for (int32_t i = 0; i < count; ++i) {
        require(ended.count(events[i].seq_id) == 0, "no event after the end");
        if (events[i].kind == KT_EVENT_FINISH) {
          ended[events[i].seq_id] = events[i].finish;
        }
      }
    } while (count == 64);
  }
  require(kt_sched_check(shared.sched) == KT_OK, "check");
  return static_cast<int64_t>(ended.size());
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 20000;
  kt_sched_config config = {};
  config.struct_size = sizeof(config);
  config.flags = KT_SCHED_PREFIX_CACHE | KT_SCHED_JOURNAL;
  config.max_batch_size = 16;
  config.chunk_size = 64;
  config.page_size = 8;
  config.num_pages = 128;
  config.max_len = 128;
  config.max_queue = 64;
  config.max_samples = 64;
  config.watermark_pages = -1;
  Shared shared;
  require(kt_sched_create(&config, &shared.sched) == KT_OK, "create");
  std::vector<std::thread> clients;
  for (int i = 0; i < kNumClients; ++i) {
    clients.emplace_back(client, std::ref(shared), i, count);
  }
  const int64_t num_ended = engine(shared);
  for (std::thread& thread : clients) {
    thread.join();
  }
  kt_sched_destroy(shared.sched);
  std::printf("%lld of %d requests accepted, each with one end: ok\n",
              static_cast<long long>(num_ended), kNumClients * count);
  return num_ended == shared.accepted ? 0 : 1;
}
