// The routed experts of all layers as an object of its own: for a GPU engine, whose graph hands the
// rows over layer by layer. The CPU-only program (model/) runs the same phases inside its own job.
#pragma once

#include <atomic>
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
  ~ExpertSet();                          // ends a started job
  ExpertSet(const ExpertSet&) = delete;  // workers hold the address
  ExpertSet& operator=(const ExpertSet&) = delete;

  // [setup]
  void add(const kt_tensor& gate, const kt_tensor& up, const kt_tensor& down);
  void finish();
  int32_t num_layers() const { return static_cast<int32_t>(layers_.size()); }
  const Weight& weight(int32_t layer, int32_t which) const;

  // [engine] See kt_expert_set_run. One pool job: prepare, barrier, up, barrier, down.
  void run(int32_t layer, int32_t num_tokens, const float* x, const int32_t* ids,
           const float* weights, const uint8_t* is_prompt, float* out);
  // [engine] See kt_expert_set_start: the same job by other threads, between two flags.
  void start(const kt_expert_job& job);
  // [engine] Waits for what start() began and rethrows its failure; false: nothing was started.
  bool join();

 private:
  struct Layer {
    Weight gate, up, down;
  };

  // One run, as the workers see it.
  struct Run {
    ExpertSet* set = nullptr;
    ExpertJob job;
    const float* x = nullptr;
    const int32_t* ids = nullptr;
    const float* weights = nullptr;
    int32_t num_experts = 0;
    // Of a started one, else null: where its job is, and how many workers have not finished.
    const kt_expert_job* flags = nullptr;
    int64_t deadline_ns = 0;
    std::atomic<int32_t> left{0};
  };

  // Also notes which rows have work, in used_.
  void check_ids(const Layer& layer, int32_t num_tokens, const int32_t* ids);
  void set_up(Run& run, const kt_expert_job& wanted);
  static void work(void* context, int32_t worker);
  void compute(Run& run, int32_t worker);
  void prepare(const Run& run, int32_t worker);
  void wait_for_rows(const Run& run) const;

  Workers& workers_;
  int32_t max_tokens_;
  int32_t top_k_;
  bool finished_ = false;
  Arena arena_;
  std::vector<Layer> layers_;
  ExpertBuffers buffers_;
  uint8_t* acts_ = nullptr;  // prepared rows [max_tokens]
  uint8_t* used_ = nullptr;  // [max_tokens]
  TailCounter* tails_ = nullptr;
  kt_expert_job started_job_{};
  Run started_;
  Workers::Ticket ticket_;
  bool is_started_ = false;
  std::atomic<bool> gives_up_{false};  // a started job need not wait for its rows
};

}  // namespace kt
