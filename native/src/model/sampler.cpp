#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "base/error.h"

namespace kt {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int32_t kChunk = 256;  // ids looked at together

void check_params(const kt_sample_params& p, int32_t row) {
  const auto reject = [&](const char* field, float value, const char* limit) {
    fail_argument("samples[" + std::to_string(row) + "]." + field + " is " + std::to_string(value) +
                  ", allowed is " + limit);
  };
  if (!(p.temperature >= 0.0f)) {
    reject("temperature", p.temperature, "0 or more");
  }
  if (!(p.top_p >= 0.0f && p.top_p <= 1.0f)) {
    reject("top_p", p.top_p, "0 .. 1");
  }
  if (!(p.min_p >= 0.0f && p.min_p <= 1.0f)) {
    reject("min_p", p.min_p, "0 .. 1");
  }
  if (!(p.repetition_penalty > 0.0f)) {
    reject("repetition_penalty", p.repetition_penalty, "above 0");
  }
  if (p.top_k < 0) {
    reject("top_k", static_cast<float>(p.top_k), "0 or more");
  }
}

}  // namespace

Sampler::Sampler(Workers& workers, const VectorKernels& vector, int32_t max_rows,
                 int32_t vocab_size, int32_t sample_vocab)
    : workers_(workers),
      vector_(vector),
      vocab_size_(vocab_size),
      sample_vocab_(sample_vocab),
      num_slices_((vocab_size + kSlice - 1) / kSlice) {
  if (vocab_size < 1 || sample_vocab < 1 || sample_vocab > vocab_size) {
    fail_argument("sample_vocab is " + std::to_string(sample_vocab) + " of vocab_size " +
                  std::to_string(vocab_size) + ", allowed is 1 .. vocab_size");
  }
  work_ = arena_.allocate_array<float>(int64_t{max_rows} * vocab_size);
  slices_.resize(static_cast<size_t>(max_rows) * static_cast<size_t>(num_slices_));
  scratch_.resize(static_cast<size_t>(workers.num_threads()));
  for (DrawScratch& scratch : scratch_) {
    scratch.candidates.reserve(static_cast<size_t>(vocab_size));
    scratch.chunk_max.resize(static_cast<size_t>((vocab_size + kDrawChunk - 1) / kDrawChunk));
    scratch.order.resize(scratch.chunk_max.size());
  }
}

void Sampler::prepare(const StepView& view, const float* logits, int64_t stride,
                      kt_sample_out& out) {
  if (out.num_samples < view.num_samples) {
    fail_argument("kt_sample_out has room for " + std::to_string(out.num_samples) +
                  " rows, the step has " + std::to_string(view.num_samples));
  }
  if (view.num_samples > 0) {
    require_handle(out.tokens, "kt_sample_out.tokens");
  }
  check_samples(view, vocab_size_);
  for (int32_t row = 0; row < view.num_samples; ++row) {
    const kt_sample_params& p = view.samples[row];
    check_params(p, row);
    if (needs_raw(p)) {
      require_handle(out.logprobs, "kt_sample_out.logprobs");
    }
    if (p.num_logprobs > 0) {
      require_handle(out.top_ids, "kt_sample_out.top_ids");
      require_handle(out.top_logprobs, "kt_sample_out.top_logprobs");
    }
    if (p.mask_row < 0) {
      continue;
    }
    require_handle(out.mask, "kt_sample_out.mask");
    const uint32_t* mask = out.mask + int64_t{p.mask_row} * ((vocab_size_ + 31) / 32);
    bool any = false;
    for (int32_t id = 0; id < sample_vocab_ && !any; id += 32) {
      const int32_t left = sample_vocab_ - id;
      const uint32_t valid = left >= 32 ? ~0u : (1u << left) - 1u;
      any = (mask[id / 32] & valid) != 0;
    }
    if (!any) {
      fail_argument("samples[" + std::to_string(row) + "]: mask row " + std::to_string(p.mask_row) +
                    " allows no token");
    }
  }
  view_ = &view;
  logits_ = logits;
  stride_ = stride;
  out_ = out;
  slice_tasks_.next.store(0, std::memory_order_relaxed);
  row_tasks_.next.store(0, std::memory_order_relaxed);
}

bool Sampler::needs_copy(const kt_sample_params& p) const {
  return p.target < 0 &&
         (p.temperature > 0.0f || p.mask_row >= 0 || p.bias_count > 0 || p.history_count > 0);
}

void Sampler::run(int32_t worker) {
  const int64_t tasks = int64_t{view_->num_samples} * num_slices_;
  while (true) {
    const int64_t task = slice_tasks_.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks) {
      break;
    }
    process_slice(static_cast<int32_t>(task / num_slices_),
                  static_cast<int32_t>(task % num_slices_));
  }
  workers_.barrier();
  while (true) {
    const int64_t row = row_tasks_.next.fetch_add(1, std::memory_order_relaxed);
    if (row >= view_->num_samples) {
      break;
    }
    finish_row(static_cast<int32_t>(row), scratch_[static_cast<size_t>(worker)]);
  }
}

// Processed logits of ids [first, last) into the row's work area.
void Sampler::copy_slice(const kt_sample_params& p, int32_t row, int32_t first, int32_t last) {
  float* to = work(row);
  std::memcpy(to + first, raw(row) + first, static_cast<size_t>(last - first) * 4);
  for (int32_t i = p.history_start; i < p.history_start + p.history_count; ++i) {
    const int32_t id = view_->history_ids[i];
    if (id < first || id >= last) {
      continue;
    }
    float value = to[id];
    if (p.repetition_penalty != 1.0f) {
      value = value > 0.0f ? value / p.repetition_penalty : value * p.repetition_penalty;
    }
    const auto count = static_cast<float>(view_->history_counts[i]);
    if (count > 0.0f) {
      value -= p.presence_penalty + p.frequency_penalty * count;
    }
    to[id] = value;
  }
  for (int32_t i = p.bias_start; i < p.bias_start + p.bias_count; ++i) {
    const int32_t id = view_->bias_ids[i];
    if (id >= first && id < last) {
      to[id] += view_->bias_values[i];
    }
  }
  if (p.mask_row >= 0) {
    const uint32_t* mask = out_.mask + int64_t{p.mask_row} * ((vocab_size_ + 31) / 32);
    for (int32_t id = first; id < last; ++id) {
      if (((mask[id >> 5] >> (id & 31)) & 1u) == 0) {
        to[id] = kNever;
      }
    }
  }
  for (int32_t id = std::max(first, sample_vocab_); id < last; ++id) {
    to[id] = kNever;
  }
}

void Sampler::process_slice(int32_t row, int32_t slice) {
  const kt_sample_params& p = view_->samples[row];
  const int32_t first = slice * kSlice;
  const int32_t last = std::min(vocab_size_, first + kSlice);
  SliceResult& result = slices_[static_cast<size_t>(row) * static_cast<size_t>(num_slices_) +
                                static_cast<size_t>(slice)];
  result = {kNever, first, kNever, 0.0};
  if (needs_copy(p)) {
    copy_slice(p, row, first, last);
    result.best_id = first + vector_.argmax(work(row) + first, last - first, &result.best);
  } else if (p.target < 0 && first < sample_vocab_) {
    const int32_t count = std::min(last, sample_vocab_) - first;
    result.best_id = first + vector_.argmax(raw(row) + first, count, &result.best);
  }
  if (needs_raw(p)) {
    (void)vector_.argmax(raw(row) + first, last - first, &result.raw_max);
    if (result.raw_max > kNever) {
      result.raw_sum =
          vector_.sum_exp(raw(row) + first, last - first, result.raw_max, 1.0f, nullptr);
    }
  }
}

void Sampler::finish_row(int32_t row, DrawScratch& scratch) {
  const kt_sample_params& p = view_->samples[row];
  const SliceResult* parts =
      slices_.data() + static_cast<size_t>(row) * static_cast<size_t>(num_slices_);
  float best = kNever;
  int32_t best_id = 0;
  float raw_max = kNever;
  for (int32_t s = 0; s < num_slices_; ++s) {
    if (parts[s].best > best) {  // strictly: the lowest id wins
      best = parts[s].best;
      best_id = parts[s].best_id;
    }
    raw_max = std::max(raw_max, parts[s].raw_max);
  }
  int32_t token = best_id;
  if (p.target >= 0) {
    token = p.target;
  } else if (p.temperature > 0.0f && std::isfinite(best)) {
    token = draw(p, work(row), best, best_id, scratch);
  }
  out_.tokens[row] = token;
  if (!needs_raw(p)) {
    return;
  }
  double sum = 0.0;
  for (int32_t s = 0; s < num_slices_; ++s) {
    if (parts[s].raw_max > kNever) {
      sum += parts[s].raw_sum *
             std::exp(static_cast<double>(parts[s].raw_max) - static_cast<double>(raw_max));
    }
  }
  const double log_sum = static_cast<double>(raw_max) + std::log(sum);
  out_.logprobs[row] = static_cast<float>(static_cast<double>(raw(row)[token]) - log_sum);
  if (p.num_logprobs > 0) {
    write_alternatives(row, p.num_logprobs, log_sum);
  }
}

// The count most likely ids of the raw distribution, ties by id.
void Sampler::write_alternatives(int32_t row, int32_t count, double log_sum) {
  const float* values = raw(row);
  int32_t* ids = out_.top_ids + int64_t{row} * KT_MAX_LOGPROBS;
  int32_t filled = 0;
  count = std::min(count, vocab_size_);
  for (int32_t at = 0; at < vocab_size_; at += kChunk) {
    const int32_t n = std::min(kChunk, vocab_size_ - at);
    float top = 0.0f;
    (void)vector_.argmax(values + at, n, &top);
    if (filled == count && !(top > values[ids[count - 1]])) {
      continue;
    }
    for (int32_t id = at; id < at + n; ++id) {
      if (filled == count && !(values[id] > values[ids[count - 1]])) {
        continue;
      }
      int32_t place = filled < count ? filled++ : count - 1;
      for (; place > 0 && values[id] > values[ids[place - 1]]; --place) {
        ids[place] = ids[place - 1];
      }
      ids[place] = id;
    }
  }
  float* logprobs = out_.top_logprobs + int64_t{row} * KT_MAX_LOGPROBS;
  for (int32_t i = 0; i < filled; ++i) {
    logprobs[i] = static_cast<float>(static_cast<double>(values[ids[i]]) - log_sum);
  }
}

}  // namespace kt
