// One step's metadata block, checked: the arrays the scheduler wrote, as typed pointers.
#pragma once

#include <cstdint>

#include "kt.h"

namespace kt {

struct StepView {
  int32_t num_tokens = 0;
  int32_t num_rows = 0;
  int32_t num_samples = 0;
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* token_row = nullptr;
  const int32_t* kv_slot = nullptr;
  const int32_t* row_start = nullptr;
  const int32_t* context_len = nullptr;
  const int32_t* num_prompt = nullptr;
  const int32_t* page_start = nullptr;
  const int32_t* page_ids = nullptr;
  const kt_sample_params* samples = nullptr;
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  const int32_t* history_ids = nullptr;
  const int32_t* history_counts = nullptr;
  int32_t num_bias = 0;
  int32_t num_history = 0;
};

// Pointers into the block; throws when an offset leaves it.
StepView view_samples(const kt_plan& plan, const kt_block_layout& layout, const void* block);
// The same with everything a forward pass reads, its ranges and page ids checked.
StepView view_step(const kt_plan& plan, const kt_block_layout& layout, const void* block,
                   const kt_model_config& config);
// Every index a sampler follows; vocab_size bounds the ids.
void check_samples(const StepView& view, int32_t vocab_size);

}  // namespace kt
