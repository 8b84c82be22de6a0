#include "sched/journal.h"

#include <algorithm>
#include <cstring>

namespace kt::sched {
namespace {

constexpr size_t kMaxBytes = size_t{64} << 20;

uint64_t mix(uint64_t hash, uint64_t value) {
  const auto product = static_cast<unsigned __int128>(hash ^ value) * 0x9E3779B97F4A7C15;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64) ^ 0xD6E8FEB8;
}

template <class Value>
void put(std::string& line, Value value) {
  line += ' ';
  line += std::to_string(value);
}

void put_list(std::string& line, const int32_t* values, size_t count) {
  put(line, count);
  for (size_t i = 0; i < count; ++i) {
    put(line, values[i]);
  }
}

}  // namespace

uint64_t plan_digest(const kt_block_layout& layout, const kt_plan& plan, const void* block) {
  const auto* base = static_cast<const char*>(block);
  uint64_t hash = plan.step_id;
  const auto take = [&](int64_t offset, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      int32_t value;
      std::memcpy(&value, base + offset + i * 4, 4);
      hash = mix(hash, static_cast<uint32_t>(value));
    }
    hash = mix(hash, static_cast<uint64_t>(count));
  };
  take(layout.tokens, plan.num_tokens);
  take(layout.positions, plan.num_tokens);
  take(layout.kv_slot, plan.num_tokens);
  take(layout.row_start, plan.num_rows + 1);
  take(layout.context_len, plan.num_rows);
  take(layout.num_prompt, plan.num_rows);
  take(layout.page_start, plan.num_rows + 1);
  take(layout.page_ids, plan.num_page_ids);
  take(layout.copies_out, plan.num_copies_out * 2);
  take(layout.copies_in, plan.num_copies_in * 2);
  take(layout.history_ids, plan.num_history);
  take(layout.history_counts, plan.num_history);
  const auto* samples = reinterpret_cast<const kt_sample_params*>(base + layout.samples);
  for (int32_t s = 0; s < plan.num_samples; ++s) {
    hash = mix(hash, samples[s].seq_id);
    hash = mix(hash, static_cast<uint32_t>(samples[s].token_index));
    hash = mix(hash, static_cast<uint32_t>(samples[s].target));
    hash = mix(hash, static_cast<uint32_t>(samples[s].position));
  }
  return hash;
}

void Journal::submit(const Sequence& seq) {
  std::string line = "submit";
  put(line, seq.submit_ns);
  put(line, seq.seq_id);
  put(line, seq.sampling.seed);
  put(line, seq.cache_salt);
  put(line, seq.max_tokens);
  put(line, seq.min_tokens);
  put(line, seq.priority);
  put(line, seq.prompt_logprobs);
  put(line, seq.history.is_on() ? 1 : 0);
  put_list(line, seq.stop_ids.data(), seq.stop_ids.size());
  put_list(line, seq.tokens.data(), seq.tokens.size());
  add(std::move(line));
}

void Journal::cancel(uint64_t seq_id) { add("cancel " + std::to_string(seq_id)); }

void Journal::plan(const char* call, int64_t now_ns, int32_t status, uint64_t digest) {
  std::string line = call;
  put(line, now_ns);
  put(line, status);
  line += ' ';
  for (int shift = 60; shift >= 0; shift -= 4) {
    line += "0123456789abcdef"[digest >> shift & 15];
  }
  add(std::move(line));
}

void Journal::commit(const char* call, int64_t now_ns, const int32_t* tokens, int32_t num_tokens) {
  std::string line = call;
  put(line, now_ns);
  put_list(line, tokens, static_cast<size_t>(num_tokens));
  add(std::move(line));
}

void Journal::fail(const char* call, int64_t now_ns) {
  add(std::string(call) + " " + std::to_string(now_ns));
}

void Journal::add(std::string line) {
  if (has_overflown_ && text_.empty()) {
    has_overflown_ = false;
  }
  if (has_overflown_) {
    return;
  }
  if (text_.size() + line.size() > kMaxBytes) {
    has_overflown_ = true;
    line = "overflow";
  }
  text_ += line;
  text_ += '\n';
}

int64_t Journal::drain(char* text, int64_t capacity) {
  const size_t count = std::min(text_.size(), static_cast<size_t>(capacity));
  std::memcpy(text, text_.data(), count);
  text_.erase(0, count);
  return static_cast<int64_t>(count);
}

}  // namespace kt::sched
