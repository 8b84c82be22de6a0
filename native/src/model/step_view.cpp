#include "model/step_view.h"

#include <string>

#include "base/error.h"

namespace kt {
namespace {

std::string number(int64_t value) { return std::to_string(value); }

[[noreturn]] void bad(const char* array, int64_t index, int64_t value, const std::string& limit) {
  fail_argument(std::string(array) + "[" + number(index) + "] is " + number(value) +
                ", allowed is " + limit);
}

class Block {
 public:
  Block(const kt_block_layout& layout, const void* block)
      : base_(static_cast<const uint8_t*>(block)), num_bytes_(layout.num_bytes) {
    if (block == nullptr) {
      fail_argument("block is NULL");
    }
  }
  // Typed pointer to count elements at offset; nothing is checked for an empty array.
  template <class T>
  const T* array(const char* name, int64_t offset, int64_t count) const {
    if (count == 0) {
      return nullptr;
    }
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (offset < 0 || offset % static_cast<int64_t>(alignof(T)) != 0 || bytes > num_bytes_ ||
        offset > num_bytes_ - bytes) {
      fail_argument(std::string("block layout: ") + name + " at offset " + number(offset) +
                    " with " + number(count) + " entries does not lie in the block of " +
                    number(num_bytes_) + " bytes");
    }
    return reinterpret_cast<const T*>(base_ + offset);
  }

 private:
  const uint8_t* base_;
  int64_t num_bytes_;
};

void check_count(const char* name, int32_t value, int32_t low, int32_t high) {
  if (value < low || value > high) {
    fail_argument(std::string("plan.") + name + " is " + number(value) + ", allowed is " +
                  number(low) + " .. " + number(high));
  }
}

// One row's tokens: positions, owner and KV slots agree with the row's pages.
void check_row(const StepView& view, int32_t row, const kt_model_config& config) {
  const int32_t first = view.row_start[row];
  const int32_t last = view.row_start[row + 1];
  const int32_t context = view.context_len[row];
  const int32_t pages = view.page_start[row + 1] - view.page_start[row];
  if (last < first || last > view.num_tokens) {
    bad("row_start", row + 1, last, number(first) + " .. " + number(view.num_tokens));
  }
  if (pages < 0 || view.page_start[row] < 0) {
    bad("page_start", row + 1, pages, "ascending ranges");
  }
  if (context < last - first || int64_t{context} > int64_t{pages} * config.page_size) {
    bad("context_len", row, context,
        number(last - first) + " tokens .. " + number(int64_t{pages} * config.page_size) +
            " positions of its pages");
  }
  if (view.num_prompt[row] < 0 || view.num_prompt[row] > last - first) {
    bad("num_prompt", row, view.num_prompt[row], "0 .. " + number(last - first) + " tokens");
  }
  const int32_t* ids = view.page_ids + view.page_start[row];
  for (int32_t page = 0; page < pages; ++page) {
    if (ids[page] < 0 || ids[page] >= config.num_pages) {
      bad("page_ids", view.page_start[row] + page, ids[page],
          "0 .. " + number(config.num_pages - 1));
    }
  }
  for (int32_t t = first; t < last; ++t) {
    const int32_t position = context - (last - first) + (t - first);
    if (view.positions[t] != position) {
      bad("positions", t, view.positions[t], number(position));
    }
    if (view.token_row[t] != row) {
      bad("token_row", t, view.token_row[t], number(row));
    }
    const int64_t slot =
        int64_t{ids[position / config.page_size]} * config.page_size + position % config.page_size;
    if (view.kv_slot[t] != slot) {
      bad("kv_slot", t, view.kv_slot[t], number(slot));
    }
  }
}

}  // namespace

StepView view_samples(const kt_plan& plan, const kt_block_layout& layout, const void* block) {
  const Block memory(layout, block);
  check_count("num_samples", plan.num_samples, 0, INT32_MAX);
  check_count("num_bias", plan.num_bias, 0, INT32_MAX);
  check_count("num_history", plan.num_history, 0, INT32_MAX);
  StepView view;
  view.num_tokens = plan.num_tokens;
  view.num_rows = plan.num_rows;
  view.num_samples = plan.num_samples;
  view.num_bias = plan.num_bias;
  view.num_history = plan.num_history;
  view.samples = memory.array<kt_sample_params>("samples", layout.samples, plan.num_samples);
  view.bias_ids = memory.array<int32_t>("bias_ids", layout.bias_ids, plan.num_bias);
  view.bias_values = memory.array<float>("bias_values", layout.bias_values, plan.num_bias);
  view.history_ids = memory.array<int32_t>("history_ids", layout.history_ids, plan.num_history);
  view.history_counts =
      memory.array<int32_t>("history_counts", layout.history_counts, plan.num_history);
  return view;
}

StepView view_step(const kt_plan& plan, const kt_block_layout& layout, const void* block,
                   const kt_model_config& config) {
  check_count("num_tokens", plan.num_tokens, 1, config.max_tokens);
  check_count("num_rows", plan.num_rows, 1, config.max_rows);
  check_count("num_samples", plan.num_samples, 0, config.max_logit_rows);
  check_count("num_page_ids", plan.num_page_ids, 1, INT32_MAX);
  StepView view = view_samples(plan, layout, block);
  const Block memory(layout, block);
  const int64_t tokens = plan.num_tokens;
  const int64_t rows = plan.num_rows;
  view.tokens = memory.array<int32_t>("tokens", layout.tokens, tokens);
  view.positions = memory.array<int32_t>("positions", layout.positions, tokens);
  view.token_row = memory.array<int32_t>("token_row", layout.token_row, tokens);
  view.kv_slot = memory.array<int32_t>("kv_slot", layout.kv_slot, tokens);
  view.row_start = memory.array<int32_t>("row_start", layout.row_start, rows + 1);
  view.context_len = memory.array<int32_t>("context_len", layout.context_len, rows);
  view.num_prompt = memory.array<int32_t>("num_prompt", layout.num_prompt, rows);
  view.page_start = memory.array<int32_t>("page_start", layout.page_start, rows + 1);
  view.page_ids = memory.array<int32_t>("page_ids", layout.page_ids, plan.num_page_ids);
  if (view.row_start[0] != 0) {
    bad("row_start", 0, view.row_start[0], "0");
  }
  if (view.row_start[rows] != plan.num_tokens) {
    bad("row_start", rows, view.row_start[rows], number(tokens) + " (num_tokens)");
  }
  if (view.page_start[0] < 0) {
    bad("page_start", 0, view.page_start[0], "0 or more");
  }
  for (int32_t row = 0; row < plan.num_rows; ++row) {
    if (view.page_start[row + 1] > plan.num_page_ids) {
      bad("page_start", row + 1, view.page_start[row + 1], "at most " + number(plan.num_page_ids));
    }
    check_row(view, row, config);
  }
  for (int32_t s = 0; s < view.num_samples; ++s) {
    const int32_t index = view.samples[s].token_index;
    if (index < 0 || index >= plan.num_tokens) {
      bad("samples.token_index", s, index, "0 .. " + number(tokens - 1));
    }
  }
  return view;
}

void check_samples(const StepView& view, int32_t vocab_size) {
  for (int32_t s = 0; s < view.num_samples; ++s) {
    const kt_sample_params& p = view.samples[s];
    if (p.bias_count < 0 || p.bias_start < 0 || p.bias_count > view.num_bias - p.bias_start) {
      bad("samples.bias_count", s, p.bias_count, "within the step's " + number(view.num_bias));
    }
    if (p.history_count < 0 || p.history_start < 0 ||
        p.history_count > view.num_history - p.history_start) {
      bad("samples.history_count", s, p.history_count,
          "within the step's " + number(view.num_history));
    }
    if (p.target < -1 || p.target >= vocab_size) {
      bad("samples.target", s, p.target, "-1 .. " + number(vocab_size - 1));
    }
    if (p.num_logprobs < -1 || p.num_logprobs > KT_MAX_LOGPROBS) {
      bad("samples.num_logprobs", s, p.num_logprobs, "-1 .. " + number(KT_MAX_LOGPROBS));
    }
    for (int32_t i = 0; i < p.bias_count; ++i) {
      const int32_t id = view.bias_ids[p.bias_start + i];
      if (id < 0 || id >= vocab_size) {
        bad("bias_ids", p.bias_start + i, id, "0 .. " + number(vocab_size - 1));
      }
    }
    for (int32_t i = 0; i < p.history_count; ++i) {
      const int32_t id = view.history_ids[p.history_start + i];
      if (id < 0 || id >= vocab_size) {
        bad("history_ids", p.history_start + i, id, "0 .. " + number(vocab_size - 1));
      }
    }
  }
}

}  // namespace kt
