// Random schedules against a fake engine, checked completely: `sched_random ACTIONS [SEED]`.
//
// The fake model is a hash: the KV entry of a position mixes the entry before with the token, so a
// wrong page, position, order or copy changes the text; the expected text of every request is known
// from its prompt alone. Configurations change every few hundred actions. Some episodes run a twin
// scheduler with the same calls, which must give the same plans bit by bit. Built with address and
// undefined-behaviour sanitizers by `make fuzz`. Exit status 1 and a line on the first error.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "kt.h"

namespace {

uint64_t g_seed = 1;
int64_t g_episode = 0;

#define REQUIRE(condition)                                                                     \
  do {                                                                                         \
    if (!(condition)) {                                                                        \
      std::printf("failed: %s (line %d, seed %llu, episode %lld): %s\n", #condition, __LINE__, \
                  static_cast<unsigned long long>(g_seed), static_cast<long long>(g_episode),  \
                  kt_last_error());                                                            \
      std::exit(1);                                                                            \
    }                                                                                          \
  } while (0)

uint64_t mix(uint64_t state, int32_t token) {
  uint64_t x = state ^ (static_cast<uint64_t>(token) + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ x >> 31) * 0xD6E8FEB86659FD93;
  return x ^ x >> 29;
}
int32_t next_token(uint64_t entry) { return static_cast<int32_t>(entry % 40); }

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int32_t in(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int32_t n) { return in(1, n) == 1; }
  template <class T>
  const T& of(const std::vector<T>& values) {
    return values[static_cast<size_t>(in(0, static_cast<int32_t>(values.size()) - 1))];
  }

 private:
  std::mt19937_64 engine_;
};

struct Client {
  std::vector<int32_t> tokens;    // prompt, then all that can ever be generated
  std::vector<uint64_t> entries;  // KV entry of each of them
  std::set<int32_t> stop_ids;
  int32_t prompt_len = 0;
  int32_t max_tokens = 0;
  int32_t min_tokens = 0;
  bool has_scores = false;
  bool has_penalty = false;
  bool is_cancelled = false;
  bool may_fail = false;
  int32_t received = 0;
  int32_t scored = 0;
};

class Episode {
 public:
  Episode(Random& random, int64_t num_actions) : random_(random), budget_(num_actions) {
    choose_config();
    REQUIRE(kt_sched_create(&config_, &sched_) == KT_OK);
    if (random_.one_in(4)) {
      REQUIRE(kt_sched_create(&config_, &twin_) == KT_OK);
    }
    layout_.struct_size = sizeof(layout_);
    REQUIRE(kt_sched_layout(sched_, &layout_) == KT_OK);
    block_.resize(static_cast<size_t>(layout_.num_bytes));
    twin_block_.resize(twin_ != nullptr ? block_.size() : 0);
    kv_.assign(static_cast<size_t>(config_.num_pages) * config_.page_size, 0);
    host_kv_.assign(static_cast<size_t>(config_.num_host_pages) * config_.page_size, 0);
    for (int i = 0; i < 3; ++i) {
      std::vector<int32_t> stem;
      for (int32_t n = random_.in(0, config_.max_len - 2); n > 0; --n) {
        stem.push_back(random_.in(0, 39));
      }
      stems_.push_back(stem);
    }
  }
  ~Episode() {
    kt_sched_destroy(sched_);
    kt_sched_destroy(twin_);
  }
  Episode(const Episode&) = delete;
  Episode& operator=(const Episode&) = delete;

  int64_t run() {
    const int32_t length = random_.in(20, 1500);
    for (int32_t i = 0; i < length && num_actions_ < budget_; ++i) {
      act();
      if (random_.one_in(6)) {
        check();
      }
    }
    finish_all();
    return num_actions_;
  }

  int64_t preempted = 0, copied = 0, hits = 0, tokens = 0, lane_steps = 0;

 private:
  void choose_config() {
    config_.struct_size = sizeof(config_);
    config_.flags = static_cast<uint32_t>(random_.in(0, 3));
    config_.policy = random_.in(0, 1);
    config_.max_batch_size = random_.of<int32_t>({1, 2, 4, 8});
    config_.chunk_size = random_.of<int32_t>({1, 3, 8, 16, 64});
    config_.page_size = random_.of<int32_t>({1, 2, 4, 5, 8});
    config_.num_pages = random_.in(2, 40);
    config_.max_len =
        std::max(2, random_.in(2, std::min(90, config_.num_pages * config_.page_size)));
    config_.max_queue = random_.of<int32_t>({1, 4, 50});
    config_.max_samples = config_.max_batch_size + random_.of<int32_t>({0, 1, 10, 60});
    config_.watermark_pages = random_.of<int32_t>({-1, 0, 1, 3}) % (config_.num_pages + 1);
    const bool has_cache = (config_.flags & KT_SCHED_PREFIX_CACHE) != 0;
    config_.num_host_pages = has_cache ? random_.of<int32_t>({0, 0, 1, 5, 60}) : 0;
    config_.queue_timeout_ns = random_.of<int64_t>({0, 0, 500, 5000});
    config_.target_itl_ns = random_.of<int64_t>({0, 0, 10, 100});
    config_.priority_step_ns = random_.of<int64_t>({0, 100});
    config_.lane_tokens = random_.of<int32_t>({0, 1, 4, 20});
  }

  void act() {
    num_actions_ += 1;
    now_ += random_.in(0, 60);
    const int32_t what = random_.in(0, 99);
    if (what < 22) {
      submit();
    } else if (what < 28) {
      cancel();
    } else if (what < 60) {
      plan();
    } else if (what < 68) {
      plan_lane();
    } else if (what < 94) {
      commit();
    } else if (what < 98) {
      finish_lane(random_.one_in(20));
    } else {
      fail();
    }
  }

  void submit() {
    Client client;
    const std::vector<int32_t>& stem = random_.of(stems_);
    client.tokens.assign(stem.begin(),
                         stem.begin() + random_.in(0, static_cast<int32_t>(stem.size())));
    const int32_t room = config_.max_len - 1 - static_cast<int32_t>(client.tokens.size());
    for (int32_t n = random_.in(0, std::min(room, 12)); n > 0; --n) {
      client.tokens.push_back(random_.in(0, 39));
    }
    if (client.tokens.empty()) {
      client.tokens.push_back(1);
    }
    client.prompt_len = static_cast<int32_t>(client.tokens.size());
    client.max_tokens = random_.of<int32_t>({0, 1, 2, 5, 20, 100});
    client.min_tokens = random_.of<int32_t>({0, 0, 3});
    client.has_scores = random_.one_in(4);
    client.has_penalty = random_.one_in(5);
    std::vector<int32_t> stop_ids;
    for (int32_t n = random_.in(0, 3); n > 0; --n) {
      stop_ids.push_back(random_.in(0, 39));
    }
    client.stop_ids.insert(stop_ids.begin(), stop_ids.end());
    for (int32_t p = 0; p <= config_.max_len; ++p) {
      const uint64_t before = p > 0 ? client.entries.back() : 0;
      if (p >= client.prompt_len) {
        client.tokens.push_back(next_token(before));
      }
      client.entries.push_back(mix(before, client.tokens[static_cast<size_t>(p)]));
    }
    kt_request request = {};
    request.struct_size = sizeof(request);
    request.num_tokens = client.prompt_len;
    request.tokens = client.tokens.data();
    request.seq_id = next_id_++;
    request.seed = request.seq_id * 3;
    request.cache_salt = random_.one_in(4) ? 1 : 0;
    request.max_tokens = client.max_tokens;
    request.min_tokens = client.min_tokens;
    request.priority = random_.one_in(3) ? random_.in(-3, 3) : 0;
    request.num_stop_ids = static_cast<int32_t>(stop_ids.size());
    request.stop_ids = stop_ids.data();
    request.top_p = 1;
    request.repetition_penalty = client.has_penalty ? 1.5F : 1;
    request.num_logprobs = -1;
    request.prompt_logprobs = client.has_scores ? 1 : -1;
    const int32_t status = kt_sched_submit(sched_, &request, now_);
    if (twin_ != nullptr) {
      REQUIRE(kt_sched_submit(twin_, &request, now_) == status);
    }
    REQUIRE(status == KT_OK || status == KT_FULL);
    if (status == KT_OK) {
      clients_.emplace(request.seq_id, std::move(client));
    }
  }

  void cancel() {
    if (next_id_ == 1) {
      return;
    }
    const auto id = static_cast<uint64_t>(random_.in(1, static_cast<int32_t>(next_id_)));
    const uint64_t target = !clients_.empty() && random_.one_in(2) ? clients_.begin()->first : id;
    REQUIRE(kt_sched_cancel(sched_, target) == KT_OK);
    if (twin_ != nullptr) {
      REQUIRE(kt_sched_cancel(twin_, target) == KT_OK);
    }
    const auto it = clients_.find(target);
    if (it != clients_.end()) {
      it->second.is_cancelled = true;
    }
  }

  bool plan() {
    const size_t most = (config_.flags & KT_SCHED_LOOKAHEAD) != 0 ? 2 : 1;
    if (results_.size() >= most) {
      kt_plan refused = {};
      refused.struct_size = sizeof(refused);
      REQUIRE(kt_sched_plan(sched_, now_, block_.data(), &refused) == KT_ERR_STATE);
      return false;
    }
    std::memset(block_.data(), 0xEE, block_.size());
    kt_plan plan = {};
    plan.struct_size = sizeof(plan);
    const int32_t status = kt_sched_plan(sched_, now_, block_.data(), &plan);
    REQUIRE(status == KT_OK || status == KT_IDLE);
    if (twin_ != nullptr) {
      std::memset(twin_block_.data(), 0xEE, twin_block_.size());
      kt_plan twin_plan = {};
      twin_plan.struct_size = sizeof(twin_plan);
      REQUIRE(kt_sched_plan(twin_, now_, twin_block_.data(), &twin_plan) == status);
      REQUIRE(std::memcmp(&plan, &twin_plan, sizeof(plan)) == 0);
      REQUIRE(std::memcmp(block_.data(), twin_block_.data(), block_.size()) == 0);
    }
    drain();
    if (status == KT_OK) {
      results_.push_back(execute(plan));
    }
    return status == KT_OK;
  }

  // The lane's step runs at its commit, the latest moment; its page copies at once.
  void plan_lane() {
    kt_plan plan = {};
    plan.struct_size = sizeof(plan);
    if (config_.lane_tokens == 0 || has_lane_) {
      REQUIRE(kt_sched_plan_lane(sched_, now_, block_.data(), &plan) == KT_ERR_STATE);
      return;
    }
    lane_block_.assign(block_.size(), static_cast<char>(0xEE));
    const int32_t status = kt_sched_plan_lane(sched_, now_, lane_block_.data(), &plan);
    REQUIRE(status == KT_OK || status == KT_IDLE);
    if (twin_ != nullptr) {
      std::memset(twin_block_.data(), 0xEE, twin_block_.size());
      kt_plan twin_plan = {};
      twin_plan.struct_size = sizeof(twin_plan);
      REQUIRE(kt_sched_plan_lane(twin_, now_, twin_block_.data(), &twin_plan) == status);
      REQUIRE(std::memcmp(&plan, &twin_plan, sizeof(plan)) == 0);
      REQUIRE(std::memcmp(lane_block_.data(), twin_block_.data(), block_.size()) == 0);
    }
    drain();
    if (status == KT_OK) {
      has_lane_ = true;
      lane_plan_ = plan;
      num_before_lane_ = results_.size();
      std::swap(block_, lane_block_);
      begin_copies(plan);
      end_copies(plan);
      std::swap(block_, lane_block_);
    }
  }

  void finish_lane(bool fails) {
    if (!has_lane_ || num_before_lane_ > 0) {
      const int32_t status =
          fails ? kt_sched_fail_lane(sched_, now_) : kt_sched_commit_lane(sched_, now_, nullptr, 0);
      REQUIRE(status == KT_ERR_STATE || (has_lane_ && status == KT_ERR_ARGUMENT));
      return;
    }
    if (fails) {
      mark_failing(true);
      REQUIRE(kt_sched_fail_lane(sched_, now_) == KT_OK);
      REQUIRE(twin_ == nullptr || kt_sched_fail_lane(twin_, now_) == KT_OK);
    } else {
      std::swap(block_, lane_block_);
      in_lane_ = true;
      run_rows(lane_plan_, {});
      const std::vector<int32_t> result = sample(lane_plan_);
      in_lane_ = false;
      std::swap(block_, lane_block_);
      const auto count = static_cast<int32_t>(result.size());
      REQUIRE(kt_sched_commit_lane(sched_, now_, result.data(), count + 1) == KT_ERR_ARGUMENT);
      REQUIRE(kt_sched_commit_lane(sched_, now_, result.data(), count) == KT_OK);
      REQUIRE(twin_ == nullptr || kt_sched_commit_lane(twin_, now_, result.data(), count) == KT_OK);
      tokens += count;
      lane_steps += 1;
    }
    has_lane_ = false;
    drain();
    mark_failing(false);
  }

  void mark_failing(bool may_fail) {
    for (auto& [id, client] : clients_) {
      client.may_fail = may_fail || (has_lane_ && client.may_fail);
    }
  }

  const int32_t* ints(int64_t offset) const {
    return reinterpret_cast<const int32_t*>(block_.data() + offset);
  }

  void copy_page(std::vector<uint64_t>& to, int32_t to_page, const std::vector<uint64_t>& from,
                 int32_t from_page) {
    const auto size = config_.page_size;
    std::copy_n(from.begin() + from_page * size, size, to.begin() + to_page * size);
  }

  std::vector<int32_t> execute(const kt_plan& plan) {
    REQUIRE(plan.num_rows <= config_.max_batch_size);
    REQUIRE(plan.num_tokens <= std::max(config_.chunk_size, config_.max_batch_size));
    REQUIRE(plan.num_samples <= config_.max_samples);
    run_rows(plan, begin_copies(plan));
    end_copies(plan);
    previous_ = sample(plan);
    return previous_;
  }

  // Copies pages out; the places of coming pages, which are returned, are unusable.
  std::set<int32_t> begin_copies(const kt_plan& plan) {
    const int32_t* out = ints(layout_.copies_out);
    const int32_t* in = ints(layout_.copies_in);
    std::set<int32_t> touched;
    for (int32_t i = 0; i < plan.num_copies_out; ++i) {
      REQUIRE(touched.insert(out[2 * i + 1]).second);
      copy_page(host_kv_, out[2 * i + 1], kv_, out[2 * i]);
    }
    touched.clear();
    for (int32_t i = 0; i < plan.num_copies_in; ++i) {
      REQUIRE(touched.insert(in[2 * i]).second);
      std::fill_n(kv_.begin() + in[2 * i] * config_.page_size, config_.page_size, 0);
    }
    return touched;
  }

  void end_copies(const kt_plan& plan) {
    const int32_t* in = ints(layout_.copies_in);
    for (int32_t i = 0; i < plan.num_copies_in; ++i) {
      copy_page(kv_, in[2 * i], host_kv_, in[2 * i + 1]);
    }
  }

  void run_rows(const kt_plan& plan, const std::set<int32_t>& loading) {
    const int32_t* tokens = ints(layout_.tokens);
    const int32_t* row_start = ints(layout_.row_start);
    const int32_t* page_start = ints(layout_.page_start);
    const int32_t* page_ids = ints(layout_.page_ids);
    std::set<int32_t> written;
    REQUIRE(row_start[0] == 0 && page_start[0] == 0);
    for (int32_t row = 0; row < plan.num_rows; ++row) {
      const int32_t begin = row_start[row], end = row_start[row + 1];
      const int32_t context = ints(layout_.context_len)[row];
      const int32_t first = context - (end - begin);
      const int32_t* pages = page_ids + page_start[row];
      const int32_t num_pages = page_start[row + 1] - page_start[row];
      REQUIRE(end > begin && first >= 0);
      REQUIRE(num_pages == (context + config_.page_size - 1) / config_.page_size);
      REQUIRE(ints(layout_.last_page_len)[row] == context - (num_pages - 1) * config_.page_size);
      REQUIRE(end == begin + 1 || row >= plan.num_decode_rows);
      for (int32_t i = 0; i < num_pages; ++i) {
        REQUIRE(pages[i] >= 0 && pages[i] < config_.num_pages && loading.count(pages[i]) == 0);
      }
      uint64_t entry = 0;
      if (first > 0) {
        entry = kv_[static_cast<size_t>(pages[(first - 1) / config_.page_size] * config_.page_size +
                                        (first - 1) % config_.page_size)];
      }
      for (int32_t i = begin; i < end; ++i) {
        const int32_t position = first + i - begin;
        const int32_t slot =
            pages[position / config_.page_size] * config_.page_size + position % config_.page_size;
        REQUIRE(ints(layout_.positions)[i] == position && ints(layout_.token_row)[i] == row);
        REQUIRE(ints(layout_.kv_slot)[i] == slot && written.insert(slot).second);
        int32_t token = tokens[i];
        if (token < 0) {
          REQUIRE((config_.flags & KT_SCHED_LOOKAHEAD) != 0);
          REQUIRE(static_cast<size_t>(-1 - token) < previous_.size());
          token = previous_[static_cast<size_t>(-1 - token)];
        }
        entry = mix(entry, token);
        kv_[static_cast<size_t>(slot)] = entry;
      }
    }
    REQUIRE(row_start[plan.num_rows] == plan.num_tokens);
    REQUIRE(page_start[plan.num_rows] == plan.num_page_ids);
  }

  std::vector<int32_t> sample(const kt_plan& plan) {
    const auto* samples =
        reinterpret_cast<const kt_sample_params*>(block_.data() + layout_.samples);
    std::vector<int32_t> result;
    for (int32_t s = 0; s < plan.num_samples; ++s) {
      const kt_sample_params& sample = samples[s];
      const auto it = clients_.find(sample.seq_id);
      REQUIRE(it != clients_.end());  // ended sequences are never planned
      const Client& client = it->second;
      REQUIRE(in_lane_ || !client.is_cancelled);
      const auto position = static_cast<size_t>(ints(layout_.positions)[sample.token_index]);
      const uint64_t entry = kv_[static_cast<size_t>(ints(layout_.kv_slot)[sample.token_index])];
      REQUIRE(ints(layout_.token_row)[sample.token_index] == sample.row);
      REQUIRE(entry == client.entries[position]);
      REQUIRE(sample.seed == sample.seq_id * 3);
      if (s < plan.num_decode_rows) {
        REQUIRE(sample.row == s && sample.target == -1);
      }
      if (sample.target >= 0) {
        REQUIRE(client.has_scores && sample.target == client.tokens[position + 1]);
        result.push_back(sample.target);
        continue;
      }
      REQUIRE(sample.position == static_cast<int32_t>(position) + 1 - client.prompt_len);
      REQUIRE(sample.position < client.max_tokens);
      check_history(client, sample, position);
      result.push_back(next_token(entry));
    }
    return result;
  }

  void check_history(const Client& client, const kt_sample_params& sample, size_t position) {
    std::map<int32_t, int32_t> expected;
    if (client.has_penalty) {
      for (size_t p = 0; p <= position; ++p) {
        expected[client.tokens[p]] += p >= static_cast<size_t>(client.prompt_len) ? 1 : 0;
      }
    }
    REQUIRE(sample.history_count == static_cast<int32_t>(expected.size()));
    for (int32_t i = sample.history_start; i < sample.history_start + sample.history_count; ++i) {
      const auto it = expected.find(ints(layout_.history_ids)[i]);
      REQUIRE(it != expected.end() && it->second == ints(layout_.history_counts)[i]);
    }
  }

  void commit() {
    if (results_.empty()) {
      REQUIRE(kt_sched_commit(sched_, now_, nullptr, 0) == KT_ERR_STATE);
      return;
    }
    const std::vector<int32_t> result = results_.front();
    results_.pop_front();
    num_before_lane_ -= num_before_lane_ > 0 ? 1 : 0;
    const auto count = static_cast<int32_t>(result.size());
    REQUIRE(kt_sched_commit(sched_, now_, result.data(), count + 1) == KT_ERR_ARGUMENT);
    REQUIRE(kt_sched_commit(sched_, now_, result.data(), count) == KT_OK);
    if (twin_ != nullptr) {
      REQUIRE(kt_sched_commit(twin_, now_, result.data(), count) == KT_OK);
    }
    tokens += count;
    drain();
  }

  void fail() {
    if (results_.empty()) {
      return;
    }
    results_.pop_front();
    num_before_lane_ -= num_before_lane_ > 0 ? 1 : 0;
    mark_failing(true);
    REQUIRE(kt_sched_fail(sched_, now_) == KT_OK);
    if (twin_ != nullptr) {
      REQUIRE(kt_sched_fail(twin_, now_) == KT_OK);
    }
    drain();
    mark_failing(false);  // with a lane step in flight: at its commit, when its sequences end
  }

  void drain() {
    kt_event events[7], twin_events[7];
    int32_t count = 0, twin_count = 0;
    int32_t status = KT_FULL;
    while (status == KT_FULL) {
      status = kt_sched_drain(sched_, events, 7, &count);
      if (twin_ != nullptr) {
        REQUIRE(kt_sched_drain(twin_, twin_events, 7, &twin_count) == status);
        REQUIRE(count == twin_count);
        REQUIRE(std::memcmp(events, twin_events, sizeof(kt_event) * static_cast<size_t>(count)) ==
                0);
      }
      for (int32_t i = 0; i < count; ++i) {
        take(events[i]);
      }
    }
    REQUIRE(status == KT_OK);
  }

  void take(const kt_event& event) {
    const auto it = clients_.find(event.seq_id);
    REQUIRE(it != clients_.end());  // nothing after the end, nothing unasked
    Client& client = it->second;
    if (event.kind == KT_EVENT_TOKEN) {
      REQUIRE(event.token_pos == client.prompt_len + client.received);
      REQUIRE(event.token == client.tokens[static_cast<size_t>(event.token_pos)]);
      REQUIRE(!client.has_scores || client.scored == client.prompt_len - 1);
      REQUIRE(event.num_cached < client.prompt_len && event.num_cached >= 0);
      client.received += 1;
    } else if (event.kind == KT_EVENT_PROMPT_LOGPROB) {
      client.scored += 1;
      REQUIRE(client.has_scores && event.token_pos == client.scored);
      REQUIRE(event.token == client.tokens[static_cast<size_t>(event.token_pos)]);
    } else {
      check_end(client, event.finish);
      clients_.erase(it);
    }
  }

  void check_end(const Client& client, int32_t finish) {
    int32_t whole = std::min(client.max_tokens, config_.max_len - client.prompt_len);
    bool is_stopped = false;
    for (int32_t i = 1; i <= whole && !is_stopped; ++i) {
      const int32_t token = client.tokens[static_cast<size_t>(client.prompt_len + i - 1)];
      if (i >= client.min_tokens && client.stop_ids.count(token) > 0) {
        whole = i;
        is_stopped = true;
      }
    }
    if (finish == KT_FINISH_CANCELLED) {
      REQUIRE(client.is_cancelled && client.received <= whole);
    } else if (finish == KT_FINISH_TIMEOUT) {
      REQUIRE(config_.queue_timeout_ns > 0 && client.received == 0);
    } else if (finish == KT_FINISH_ERROR) {
      REQUIRE(client.may_fail);
    } else {
      REQUIRE(client.received == whole);
      REQUIRE(finish == (is_stopped ? KT_FINISH_STOP : KT_FINISH_LENGTH));
      REQUIRE(!client.has_scores || client.scored == client.prompt_len - 1);
    }
  }

  void check() {
    REQUIRE(kt_sched_check(sched_) == KT_OK);
    kt_sched_stats stats = {};
    stats.struct_size = sizeof(stats);
    REQUIRE(kt_sched_query(sched_, &stats) == KT_OK);
    REQUIRE(stats.pages_free + stats.pages_cached + stats.pages_used == config_.num_pages);
    REQUIRE(stats.num_waiting + stats.num_running == static_cast<int32_t>(clients_.size()));
  }

  void finish_all() {
    int64_t bound = 100 + 40 * config_.max_len * static_cast<int64_t>(clients_.size());
    while (!clients_.empty() || !results_.empty() || has_lane_) {
      REQUIRE(bound-- > 0);  // every request ends in bounded steps
      num_actions_ += 1;
      now_ += 20;
      if (config_.lane_tokens > 0 && !has_lane_) {
        plan_lane();
      } else if (has_lane_ && num_before_lane_ == 0 && random_.one_in(4)) {
        finish_lane(false);
      }
      if (!plan() || !random_.one_in(3)) {
        if (!results_.empty()) {
          commit();
        }
      }
    }
    check();
    kt_sched_stats stats = {};
    stats.struct_size = sizeof(stats);
    REQUIRE(kt_sched_query(sched_, &stats) == KT_OK);
    REQUIRE(stats.pages_used == 0 && stats.num_waiting == 0 && stats.num_running == 0);
    preempted += static_cast<int64_t>(stats.preempted);
    copied += static_cast<int64_t>(stats.copied_in_pages);
    hits += static_cast<int64_t>(stats.prefix_hit_tokens);
  }

  Random& random_;
  int64_t budget_;
  int64_t num_actions_ = 0;
  kt_sched_config config_ = {};
  kt_block_layout layout_ = {};
  kt_sched* sched_ = nullptr;
  kt_sched* twin_ = nullptr;
  std::vector<char> block_, twin_block_, lane_block_;
  bool has_lane_ = false;       // a lane step is in flight
  bool in_lane_ = false;        // and is being run
  size_t num_before_lane_ = 0;  // ordinary steps planned before it and not committed
  kt_plan lane_plan_ = {};
  std::vector<uint64_t> kv_, host_kv_;
  std::vector<std::vector<int32_t>> stems_;
  std::map<uint64_t, Client> clients_;
  std::deque<std::vector<int32_t>> results_;
  std::vector<int32_t> previous_;
  uint64_t next_id_ = 1;
  int64_t now_ = 1;
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t wanted = argc > 1 ? std::atoll(argv[1]) : 100000;
  g_seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  Random random(g_seed);
  int64_t actions = 0, preempted = 0, copied = 0, hits = 0, tokens = 0, lane_steps = 0;
  while (actions < wanted) {
    Episode episode(random, wanted - actions);
    actions += episode.run();
    preempted += episode.preempted;
    copied += episode.copied;
    hits += episode.hits;
    tokens += episode.tokens;
    lane_steps += episode.lane_steps;
    g_episode += 1;
  }
  std::printf(
      "%lld actions in %lld episodes: %lld tokens, %lld preemptions, %lld cached tokens used, "
      "%lld pages loaded from the host, %lld lane steps: ok\n",
      static_cast<long long>(actions), static_cast<long long>(g_episode),
      static_cast<long long>(tokens), static_cast<long long>(preempted),
      static_cast<long long>(hits), static_cast<long long>(copied),
      static_cast<long long>(lane_steps));
  return 0;
}
