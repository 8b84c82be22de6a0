// Runs a scheduled model for one step: every worker walks the steps, with barriers in between.
#pragma once

#include "model/model.h"

namespace kt {

class Executor {
 public:
  explicit Executor(Model& model) : m_(model) {}
  // One pool job; returns when the step is computed and sampled.
  void run();

 private:
  void work(int32_t worker);
  void step(const Step& step, int32_t worker);
  void embed(const Step& step, const kt_op& op, int32_t worker);
  void norm(const Step& step, const kt_op& op, int32_t worker);
  void private_norm(const Step& step, const kt_op& op, int32_t worker);
  void elementwise(const Step& step, const kt_op& op, int32_t worker);
  void gather(const Step& step, const kt_op& op, int32_t worker);
  void prepare_buffer(const Step& step, int32_t worker);
  void linear(const Step& step, int32_t worker);
  int32_t rows_by_sample(const Step& step);
  void linear_bands(const Step& step, const kt_op& op, size_t part, int32_t first, int32_t last,
                    int32_t block, int32_t worker);
  void linear_run(const Step& step, const kt_op& op, size_t part, int32_t first, int32_t last,
                  int32_t worker, const TokenRun& run);
  void finish_linear(const kt_op& op, int32_t row, int32_t m, int32_t column, int32_t columns,
                     float* sums, int64_t sums_stride);
  void attention(const Step& step, const kt_op& op, int32_t worker);
  void experts(const Step& step, const kt_op& op, int32_t worker);
  void route(const Step& step, const kt_op& op, const MoeOp& moe, int32_t worker);
  void select(const MoeOp& moe, int32_t token, WorkerScratch& scratch, int32_t* ids,
              float* weights);
  ExpertJob expert_job(const Step& step, const kt_op& op, const MoeOp& moe, int32_t worker);

  Buffer& buffer(int32_t id) { return m_.buffers_[static_cast<size_t>(id)]; }
  const Weight& weight(int32_t id) { return m_.weights_[static_cast<size_t>(id)]; }
  WorkerScratch& scratch(int32_t worker) { return m_.scratch_[static_cast<size_t>(worker)]; }
  int32_t rows_of(const Buffer& b) const {
    return b.by_sample ? m_.view_.num_samples : m_.view_.num_tokens;
  }
  // A step may use workers' private norm rows only when the norm before it made them.
  bool is_private(const Step& step, const Buffer& b) const {
    return step.use_private && rows_of(b) <= kPrivateRows;
  }
  const uint8_t* act_row(const Step& step, const Buffer& b, ActKind kind, int32_t worker) {
    return is_private(step, b) ? scratch(worker).acts[kind] : b.acts[kind];
  }
  bool is_prompt(const Buffer& b, int64_t row) const {
    return !b.by_sample && m_.is_prompt_[static_cast<size_t>(row)] != 0;
  }
  void prepare_row(const Buffer& b, uint32_t forms, int64_t row, int32_t first, int32_t count);
  // body(row, first column, columns) over this worker's pieces of a [rows, width] buffer.
  template <class Body>
  void for_pieces(int64_t rows, int32_t width, int32_t worker, Body&& body);

  Model& m_;
};

}  // namespace kt
