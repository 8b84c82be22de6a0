#include "sched/block.h"

#include <algorithm>
#include <cstring>

namespace kt::sched {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMaxBiasPerRow = 1024;
// Penalty histories of one step: beyond it the youngest penalised rows wait for a later step.
constexpr int64_t kHistoryEntries = 1 << 18;

int64_t place(int64_t& end, int64_t bytes) {
  const int64_t offset = end;
  end = (end + bytes + kAlignment - 1) / kAlignment * kAlignment;
  return offset;
}

}  // namespace

BlockCapacity block_capacity(const kt_sched_config& config) {
  const int64_t rows = config.max_batch_size;
  const int64_t max_pages = (config.max_len + config.page_size - 1) / config.page_size;
  BlockCapacity capacity;
  capacity.bias = rows * kMaxBiasPerRow;
  capacity.history =
      std::min<int64_t>(rows * config.max_len, std::max<int64_t>(config.max_len, kHistoryEntries));
  capacity.page_ids = rows * max_pages;
  // Each page can leave and each can be filled at most once in a plan.
  capacity.copies = config.num_host_pages > 0 ? config.num_pages : 1;
  return capacity;
}

kt_block_layout block_layout(const kt_sched_config& config) {
  const BlockCapacity capacity = block_capacity(config);
  const int64_t tokens = std::max(config.chunk_size, config.max_batch_size);
  const int64_t rows = config.max_batch_size;
  kt_block_layout layout = {};
  layout.struct_size = sizeof(layout);
  layout.max_tokens = static_cast<int32_t>(tokens);
  layout.max_rows = config.max_batch_size;
  layout.max_samples = config.max_samples;
  int64_t end = 0;
  layout.tokens = place(end, tokens * 4);
  layout.positions = place(end, tokens * 4);
  layout.token_row = place(end, tokens * 4);
  layout.kv_slot = place(end, tokens * 4);
  layout.row_start = place(end, (rows + 1) * 4);
  layout.context_len = place(end, rows * 4);
  layout.page_start = place(end, (rows + 1) * 4);
  layout.last_page_len = place(end, rows * 4);
  layout.num_prompt = place(end, rows * 4);
  layout.samples = place(end, config.max_samples * static_cast<int64_t>(sizeof(kt_sample_params)));
  layout.page_ids = place(end, capacity.page_ids * 4);
  layout.bias_ids = place(end, capacity.bias * 4);
  layout.bias_values = place(end, capacity.bias * 4);
  layout.history_ids = place(end, capacity.history * 4);
  layout.history_counts = place(end, capacity.history * 4);
  layout.copies_out = place(end, capacity.copies * 8);
  layout.copies_in = place(end, capacity.copies * 8);
  layout.num_bytes = end;
  return layout;
}

BlockWriter::BlockWriter(const kt_block_layout& layout, int32_t page_size, void* block,
                         kt_plan* plan)
    : layout_(layout), page_size_(page_size), base_(static_cast<char*>(block)), plan_(plan) {
  array<int32_t>(layout_.row_start)[0] = 0;
  array<int32_t>(layout_.page_start)[0] = 0;
}

void BlockWriter::add_row(const Sequence& seq, int32_t count) {
  const int32_t row = plan_->num_rows++;
  const int32_t first = seq.num_planned;
  const int32_t context = first + count;
  const int32_t num_known = seq.num_tokens();
  int32_t* tokens = array<int32_t>(layout_.tokens) + plan_->num_tokens;
  int32_t* positions = array<int32_t>(layout_.positions) + plan_->num_tokens;
  int32_t* token_row = array<int32_t>(layout_.token_row) + plan_->num_tokens;
  int32_t* kv_slot = array<int32_t>(layout_.kv_slot) + plan_->num_tokens;
  int32_t page = first / page_size_;
  int32_t offset = first % page_size_;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t position = first + i;
    // Only the last token can still be on its way out of the step in flight.
    tokens[i] =
        position < num_known ? seq.tokens[static_cast<size_t>(position)] : -1 - seq.pending_row;
    positions[i] = position;
    token_row[i] = row;
    kv_slot[i] = seq.pages[static_cast<size_t>(page)] * page_size_ + offset;
    if (++offset == page_size_) {
      offset = 0;
      ++page;
    }
  }
  row_first_token_ = plan_->num_tokens;
  row_first_position_ = first;
  plan_->num_tokens += count;

  const int32_t num_pages = (context + page_size_ - 1) / page_size_;
  std::memcpy(array<int32_t>(layout_.page_ids) + plan_->num_page_ids, seq.pages.data(),
              static_cast<size_t>(num_pages) * sizeof(int32_t));
  plan_->num_page_ids += num_pages;
  array<int32_t>(layout_.row_start)[row + 1] = plan_->num_tokens;
  array<int32_t>(layout_.context_len)[row] = context;
  array<int32_t>(layout_.page_start)[row + 1] = plan_->num_page_ids;
  array<int32_t>(layout_.last_page_len)[row] = context - (num_pages - 1) * page_size_;
  array<int32_t>(layout_.num_prompt)[row] = std::clamp(seq.prompt_len - first, 0, count);
}

int32_t BlockWriter::add_sample(const Sequence& seq, int32_t position, int32_t target) {
  const int32_t index = plan_->num_samples++;
  kt_sample_params& sample = array<kt_sample_params>(layout_.samples)[index];
  sample = seq.sampling;
  sample.token_index = row_first_token_ + position - row_first_position_;
  sample.target = target;
  sample.row = plan_->num_rows - 1;
  sample.position = seq.num_generated() + seq.num_pending;
  sample.mask_row = -1;
  sample.bias_start = plan_->num_bias;
  sample.history_start = plan_->num_history;
  if (target >= 0) {
    // Prompt log-probabilities are those of the raw logits: no bias, no penalties.
    sample.num_logprobs = seq.prompt_logprobs;
    return index;
  }
  const size_t num_bias = seq.bias_ids.size();
  if (num_bias > 0) {
    std::memcpy(array<int32_t>(layout_.bias_ids) + plan_->num_bias, seq.bias_ids.data(),
                num_bias * sizeof(int32_t));
    std::memcpy(array<float>(layout_.bias_values) + plan_->num_bias, seq.bias_values.data(),
                num_bias * sizeof(float));
    sample.bias_count = static_cast<int32_t>(num_bias);
    plan_->num_bias += sample.bias_count;
  }
  const size_t num_history = seq.history.ids().size();
  if (num_history > 0) {
    std::memcpy(array<int32_t>(layout_.history_ids) + plan_->num_history, seq.history.ids().data(),
                num_history * sizeof(int32_t));
    std::memcpy(array<int32_t>(layout_.history_counts) + plan_->num_history,
                seq.history.counts().data(), num_history * sizeof(int32_t));
    sample.history_count = static_cast<int32_t>(num_history);
    plan_->num_history += sample.history_count;
  }
  return index;
}

void BlockWriter::add_copies(const std::vector<PageCopy>& out, const std::vector<PageCopy>& in) {
  std::copy(out.begin(), out.end(), array<PageCopy>(layout_.copies_out));
  std::copy(in.begin(), in.end(), array<PageCopy>(layout_.copies_in));
  plan_->num_copies_out = static_cast<int32_t>(out.size());
  plan_->num_copies_in = static_cast<int32_t>(in.size());
}

void BlockWriter::finish(uint64_t step_id) {
  plan_->step_id = step_id;
  int64_t words = 0;
  int64_t start = layout_.page_ids;
  if (plan_->num_history > 0) {
    start = layout_.history_counts;
    words = plan_->num_history;
  } else if (plan_->num_bias > 0) {
    start = layout_.bias_values;
    words = plan_->num_bias;
  } else {
    words = plan_->num_page_ids;
  }
  plan_->used_bytes = start + words * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace kt::sched
