// The CPU forward pass as a recorded program: what kt_model is made of.
//
// DESIGN
//  add_* record buffers, weights and operations and check every shape. finish() turns the list of
//  operations into steps (schedule.cpp): consecutive linears on the same input become one step, and
//  every buffer that feeds a linear gets its prepared (quantised) form from the operation that
//  produces it. run() publishes one pool job; all workers walk the steps together. A step ends with
//  a barrier, except a norm of very few rows, which every worker computes for itself.
//  One thread at a time ([setup], then [engine]); workers only see const data and the step buffers.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/arena.h"
#include "experts/experts.h"
#include "experts/router.h"
#include "host/workers.h"
#include "kernels/kernels.h"
#include "kernels/vector.h"
#include "model/attention.h"
#include "model/sampler.h"
#include "model/step_view.h"
#include "model/weights.h"

namespace kt {

inline constexpr int32_t kNumActKinds = 2;
// Up to this many rows every worker normalises for itself: a barrier costs more.
inline constexpr int32_t kPrivateRows = 2;
// Rows of a linear that share one sweep over a worker's bands: their prepared form stays in L2.
inline constexpr int32_t kLinearRows = 256;
// Element-wise work is shared in pieces of this many columns (a multiple of 32).
inline constexpr int32_t kColumnChunk = 256;

struct Buffer {
  int32_t width = 0;
  int32_t stride = 0;  // width rounded up to 16
  bool by_sample = false;
  float* data = nullptr;
  uint8_t* acts[kNumActKinds] = {nullptr, nullptr};  // prepared rows, where a linear reads them
  int64_t act_stride[kNumActKinds] = {0, 0};
};

enum StepClass : int32_t {
  kClassOther = 0,
  kClassLinear,
  kClassAttention,
  kClassExperts,
  kNumClasses
};

// One scheduled step: an operation, a group of linears (first .. first + count), or the preparation
// of a buffer (code kStepPrepare).
inline constexpr int32_t kStepPrepare = 100;
struct Step {
  int32_t code = 0;
  int32_t first = 0;
  int32_t count = 1;
  int32_t buffer = -1;       // kStepPrepare
  uint32_t prepare = 0;      // bit ActKind: forms of the output to prepare
  bool use_private = false;  // norm: may be computed per worker; linear, experts: input is private
  int32_t tails = 0;         // first tail counter
  StepClass time_class = kClassOther;
};

// Memory of one worker.
struct WorkerScratch {
  float* row = nullptr;  // kPrivateRows private norm rows
  uint8_t* acts[kNumActKinds] = {nullptr, nullptr};
  float* temp = nullptr;  // kLinearRows * kPromptBands * kBandRows sums of a linear
  uint8_t* multiply = nullptr;
  float* choice = nullptr;  // router: scores and choice, 2 * E
  int32_t* ids = nullptr;   // kPrivateRows * K
  float* weights = nullptr;
  AttentionScratch attention;
};

// Tokens of a step that are multiplied alike.
struct TokenRun {
  int32_t first = 0;
  int32_t count = 0;
  bool is_prompt = false;
};

struct MoeOp {  // what an expert operation needs beyond kt_op
  Routing routing;
  const float* router = nullptr;  // [E, H]
  ExpertWeights weights;
};

class Model {
 public:
  Model(const kt_model_config& config, Workers& workers);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  int32_t add_buffer(int32_t width, int32_t by_sample);
  int32_t add_weight(const kt_tensor& tensor, int32_t kind);
  void add_op(const kt_op& op);
  void finish(int32_t logits_buffer);
  void run(const kt_plan& plan, const kt_block_layout& layout, const void* block,
           kt_sample_out& out);
  void read(int32_t buffer_id, int32_t first, int32_t count, float* dst);
  kt_model_stats stats() const;

 private:
  friend class OpChecker;
  friend class Scheduler;
  friend class Executor;

  void find_prompts();
  void allocate();
  void allocate_attention();
  void allocate_scratch();
  void require_setup(const char* call) const;

  const kt_model_config config_;
  Workers& workers_;
  const MatrixKernels* matrix_;
  const VectorKernels* vector_;
  Arena arena_;
  std::vector<Buffer> buffers_;
  std::vector<Weight> weights_;
  std::vector<kt_op> ops_;
  std::vector<int32_t> op_extra_;  // index into moes_ or attentions_, else -1
  std::vector<MoeOp> moes_;
  std::vector<AttentionOp> attentions_;
  bool finished_ = false;
  int32_t logits_buffer_ = -1;

  std::vector<Step> steps_;
  std::vector<WorkerScratch> scratch_;
  ExpertBuffers experts_;
  float* router_logits_ = nullptr;  // [max_tokens, max E]
  int32_t* expert_ids_ = nullptr;   // [max_tokens, max K]
  float* expert_weights_ = nullptr;
  AttentionShared attention_;
  TailCounter* tails_ = nullptr;
  int32_t num_tails_ = 0;
  std::unique_ptr<Sampler> sampler_;
  int32_t embed_rows_ = 0;          // ids must be below; 0 without an EMBED
  std::vector<int32_t> previous_;   // sampled by the step before, for look-ahead tokens
  std::vector<int32_t> tokens_;     // resolved ids of the step
  std::vector<TokenRun> runs_;      // of the step; one run where the kernels have one way only
  std::vector<uint8_t> is_prompt_;  // [T]
  StepView view_;
  int64_t class_ns_[kNumClasses] = {0, 0, 0, 0};
  int64_t sample_ns_ = 0;
  int64_t run_ns_ = 0;
  int64_t num_runs_ = 0;
  int64_t weight_bytes_ = 0;
  int64_t kv_bytes_ = 0;
  int64_t buffer_bytes_ = 0;
};

}  // namespace kt

struct kt_model {
  kt_model(const kt_model_config& config, kt::Workers& workers) : model(config, workers) {}
  kt::Model model;
};
