// Checks of what comes in: scheduler configuration and requests.
#include <cmath>
#include <string>

#include "base/error.h"
#include "sched/scheduler.h"

namespace kt::sched {
namespace {

constexpr int32_t kMaxStopIds = 64;
constexpr int32_t kMaxBias = 1024;
constexpr int32_t kMaxPriority = 1000;
constexpr int64_t kMaxPriorityStepNs = int64_t{3600} * 1'000'000'000;  // an hour

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    fail_argument(std::string(name) + " is " + std::to_string(value) + ", allowed are " +
                  std::to_string(low) + " to " + std::to_string(high));
  }
}

void check_float(const char* name, float value, float low, float high) {
  if (!(value >= low && value <= high)) {  // also refuses NaN
    fail_argument(std::string(name) + " is " + std::to_string(value) + ", allowed are " +
                  std::to_string(low) + " to " + std::to_string(high));
  }
}

void check_sampling(const kt_request& r) {
  check_float("temperature", r.temperature, 0.0F, 100.0F);
  check_float("top_p", r.top_p, 0.0F, 1.0F);
  check_float("min_p", r.min_p, 0.0F, 1.0F);
  check_float("presence_penalty", r.presence_penalty, -100.0F, 100.0F);
  check_float("frequency_penalty", r.frequency_penalty, -100.0F, 100.0F);
  check_float("repetition_penalty", r.repetition_penalty, 1e-3F, 100.0F);
  check_range("top_k", r.top_k, 0, INT32_MAX);
  check_range("num_logprobs", r.num_logprobs, -1, KT_MAX_LOGPROBS);
  check_range("prompt_logprobs", r.prompt_logprobs, -1, KT_MAX_LOGPROBS);
}

void check_fit(const kt_sched_config& config, const kt_request& r) {
  const int64_t longest = config.max_len - (r.max_tokens > 0 ? 1 : 0);
  if (r.num_tokens > longest) {
    fail_argument("the prompt has " + std::to_string(r.num_tokens) +
                  " tokens, but a sequence holds at most " + std::to_string(config.max_len) +
                  (r.max_tokens > 0 ? " tokens of prompt and output together" : " tokens"));
  }
}

}  // namespace

void check_config(const kt_sched_config& c) {
  check_range("flags", c.flags, 0, KT_SCHED_PREFIX_CACHE | KT_SCHED_LOOKAHEAD | KT_SCHED_JOURNAL);
  check_range("policy", c.policy, KT_SCHED_FCFS, KT_SCHED_FCFS_SINGLE_PREFILL);
  check_range("max_batch_size", c.max_batch_size, 1, 256);
  check_range("chunk_size", c.chunk_size, 1, 1 << 20);
  check_range("page_size", c.page_size, 1, 1 << 16);
  check_range("num_pages", c.num_pages, 1, INT32_MAX / c.page_size);
  check_range("max_len", c.max_len, 1, static_cast<int64_t>(c.num_pages) * c.page_size);
  check_range("max_queue", c.max_queue, 1, 1 << 24);
  check_range("max_samples", c.max_samples, c.max_batch_size, 1 << 20);
  check_range("watermark_pages", c.watermark_pages, -1, c.num_pages);
  const bool has_cache = (c.flags & KT_SCHED_PREFIX_CACHE) != 0;
  check_range(has_cache ? "num_host_pages" : "num_host_pages (without a prefix cache)",
              c.num_host_pages, 0, has_cache ? INT32_MAX / c.page_size : 0);
  check_range("priority_step_ns", c.priority_step_ns, 0, kMaxPriorityStepNs);
  check_range("queue_timeout_ns", c.queue_timeout_ns, 0, INT64_MAX);
  check_range("target_itl_ns", c.target_itl_ns, 0, INT64_MAX);
  check_range("lane_tokens", c.lane_tokens, 0, 1 << 20);
}

std::unique_ptr<Sequence> make_sequence(const kt_sched_config& config, const kt_request& r,
                                        int64_t now_ns) {
  check_range("seq_id", r.seq_id > 0, 1, 1);
  check_range("num_tokens", r.num_tokens, 1, INT32_MAX);
  check_range("max_tokens", r.max_tokens, 0, INT32_MAX);
  check_range("min_tokens", r.min_tokens, 0, INT32_MAX);
  check_range("priority", r.priority, -kMaxPriority, kMaxPriority);
  check_range("num_stop_ids", r.num_stop_ids, 0, kMaxStopIds);
  check_range("num_bias", r.num_bias, 0, kMaxBias);
  check_sampling(r);
  if (r.tokens == nullptr || (r.num_stop_ids > 0 && r.stop_ids == nullptr) ||
      (r.num_bias > 0 && (r.bias_ids == nullptr || r.bias_values == nullptr))) {
    fail_argument("an array of the request is NULL");
  }
  check_fit(config, r);

  auto seq = std::make_unique<Sequence>();
  seq->seq_id = r.seq_id;
  seq->sampling.seq_id = r.seq_id;
  seq->sampling.seed = r.seed;
  seq->sampling.top_k = r.top_k;
  seq->sampling.temperature = r.temperature;
  seq->sampling.top_p = r.top_p;
  seq->sampling.min_p = r.min_p;
  seq->sampling.presence_penalty = r.presence_penalty;
  seq->sampling.frequency_penalty = r.frequency_penalty;
  seq->sampling.repetition_penalty = r.repetition_penalty;
  seq->sampling.num_logprobs = r.num_logprobs;
  seq->cache_salt = r.cache_salt;
  seq->prompt_len = r.num_tokens;
  seq->max_tokens = r.max_tokens;
  seq->min_tokens = r.min_tokens;
  seq->priority = r.priority;
  seq->prompt_logprobs = r.prompt_logprobs;
  seq->submit_ns = now_ns;
  seq->stop_ids.assign(r.stop_ids, r.stop_ids + r.num_stop_ids);
  seq->bias_ids.assign(r.bias_ids, r.bias_ids + r.num_bias);
  seq->bias_values.assign(r.bias_values, r.bias_values + r.num_bias);
  seq->tokens.assign(r.tokens, r.tokens + r.num_tokens);
  for (const int32_t token : seq->tokens) {
    if (token < 0) {
      fail_argument("the prompt contains the negative token " + std::to_string(token));
    }
  }
  if ((config.flags & KT_SCHED_PREFIX_CACHE) != 0) {
    const int32_t num_pages = r.num_tokens / config.page_size;
    seq->hashes.reserve(static_cast<size_t>(num_pages));
    uint64_t hash = root_hash(r.cache_salt);
    for (int32_t i = 0; i < num_pages; ++i) {
      hash = page_hash(hash, seq->tokens.data() + i * config.page_size, config.page_size);
      seq->hashes.push_back(hash);
    }
  }
  if (r.presence_penalty != 0.0F || r.frequency_penalty != 0.0F || r.repetition_penalty != 1.0F) {
    seq->history.start(seq->tokens);
  }
  return seq;
}

}  // namespace kt::sched
