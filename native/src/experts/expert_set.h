// The routed experts of all layers as an object of its own: for a GPU engine, whose graph hands the
// rows over layer by layer. The CPU-only program (model/) runs the same phases inside its own job.
#pragma once

#include <cstdint>
#include <vector>

#include "base/arena.h"
#include "experts/experts.h"
#include "host/workers.h"
#include "kt.h"
#include "model/weights.h"

namespace kt {

class ExpertSet {
 public:
  ExpertSet(Workers& workers, int32_t max_tokens, int32_t top_k);

  // [setup]
  void add(const kt_tensor& gate, const kt_tensor& up, const kt_tensor& down);
  void finish();
  int32_t num_layers() const { return static_cast<int32_t>(layers_.size()); }
  const Weight& weight(int32_t layer, int32_t which) const;

  // [engine] See kt_expert_set_spare.
  void spare(int32_t num_workers);
  // [engine] See kt_expert_set_run. One pool job: prepare, barrier, up, barrier, down.
  void run(int32_t layer, int32_t num_tokens, const float* x, const int32_t* ids,
           const float* weights, const uint8_t* is_prompt, float* out);

 private:
  struct Layer {
    Weight gate, up, down;
  };

  // Also notes which rows have work, in used_.
  void check_ids(const Layer& layer, int32_t num_tokens, const int32_t* ids);

  Workers& workers_;
  int32_t max_tokens_;
  int32_t top_k_;
  int32_t num_spared_ = 0;
  bool finished_ = false;
  Arena arena_;
  std::vector<Layer> layers_;
  ExpertBuffers buffers_;
  uint8_t* acts_ = nullptr;  // prepared rows [max_tokens]
  uint8_t* used_ = nullptr;  // [max_tokens]
  TailCounter* tails_ = nullptr;
};

}  // namespace kt
