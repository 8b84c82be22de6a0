// The step metadata block: where its arrays lie, and a writer that fills them row by row.
#pragma once

#include <cstdint>
#include <vector>

#include "kt.h"
#include "sched/sequence.h"

namespace kt::sched {

// Number of entries that the variable arrays can hold in one step.
struct BlockCapacity {
  int64_t bias = 0;
  int64_t history = 0;
  int64_t page_ids = 0;
  int64_t copies = 0;
};

// One page on its way between the tiers, as the block holds it.
struct PageCopy {
  int32_t page;
  int32_t host_page;
};

BlockCapacity block_capacity(const kt_sched_config& config);
kt_block_layout block_layout(const kt_sched_config& config);

// Writes one plan. Rows are appended in order; the caller keeps within the capacities.
class BlockWriter {
 public:
  BlockWriter(const kt_block_layout& layout, int32_t page_size, void* block, kt_plan* plan);

  // Starts the row of `seq` with its tokens [seq.num_planned, seq.num_planned + count).
  void add_row(const Sequence& seq, int32_t count);
  // A logit row for the last added row's token at `position`; returns its number.
  int32_t add_sample(const Sequence& seq, int32_t position, int32_t target);
  void add_copies(const std::vector<PageCopy>& out, const std::vector<PageCopy>& in);
  void finish(uint64_t step_id);

 private:
  template <class T>
  T* array(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  const kt_block_layout& layout_;
  int32_t page_size_;
  char* base_;
  kt_plan* plan_;
  int32_t row_first_token_ = 0;     // index in the step of the last row's first token
  int32_t row_first_position_ = 0;  // and its position in the sequence
};

}  // namespace kt::sched
