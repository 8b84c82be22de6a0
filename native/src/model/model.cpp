#include "model/model.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "host/features.h"
#include "model/executor.h"
#include "model/op_check.h"
#include "model/schedule.h"

namespace kt {
namespace {

void check_config(const kt_model_config& c) {
  const auto require = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
      fail_argument(std::string("kt_model_config.") + name + " is " + std::to_string(value) +
                    ", allowed is " + std::to_string(low) + " .. " + std::to_string(high));
    }
  };
  require("max_tokens", c.max_tokens, 1, 1 << 20);
  require("max_rows", c.max_rows, 1, 1 << 20);
  require("max_logit_rows", c.max_logit_rows, 1, 1 << 20);
  require("page_size", c.page_size, 16, 1 << 16);
  if (c.page_size % kGroupPositions != 0) {
    fail_argument("kt_model_config.page_size is " + std::to_string(c.page_size) +
                  ", must be a multiple of 16");
  }
  require("num_pages", c.num_pages, 1, INT32_MAX / c.page_size);
  require("kv_type", c.kv_type, KT_KV_F32, KT_KV_BF16);
  require("vocab_size", c.vocab_size, 1, 1 << 28);
  require("sample_vocab", c.sample_vocab, 1, c.vocab_size);
  require("reserved", c.reserved, 0, 0);
}

}  // namespace

Model::Model(const kt_model_config& config, Workers& workers)
    : config_(config),
      workers_(workers),
      matrix_(matrix_kernels(workers.isa())),
      vector_(vector_kernels(workers.isa())) {
  check_config(config);
  if (matrix_ == nullptr || vector_ == nullptr) {
    fail_unsupported(std::string("this build has no kernels for ") + isa_name(workers.isa()));
  }
}

void Model::require_setup(const char* call) const {
  if (finished_) {
    fail_state(std::string(call) + ": the model is already finished");
  }
}

int32_t Model::add_buffer(int32_t width, int32_t by_sample) {
  require_setup("kt_model_add_buffer");
  if (width < 1 || width > 1 << 28) {
    fail_argument("buffer width is " + std::to_string(width) + ", allowed is 1 .. 268435456");
  }
  if (by_sample < 0 || by_sample > 1) {
    fail_argument("by_sample is " + std::to_string(by_sample) + ", allowed is 0 or 1");
  }
  Buffer buffer;
  buffer.width = width;
  buffer.stride = static_cast<int32_t>(round_up(width, kLanes));
  buffer.by_sample = by_sample != 0;
  buffers_.push_back(buffer);
  return static_cast<int32_t>(buffers_.size()) - 1;
}

int32_t Model::add_weight(const kt_tensor& tensor, int32_t kind) {
  require_setup("kt_model_add_weight");
  weights_.push_back(make_weight(workers_, arena_, tensor, kind));
  weight_bytes_ += weights_.back().packed_bytes;
  return static_cast<int32_t>(weights_.size()) - 1;
}

void Model::add_op(const kt_op& op) {
  require_setup("kt_model_add_op");
  const OpChecker checker(*this, op, ops_.size());
  checker.check();
  int32_t extra = -1;
  if (op.code == KT_OP_EMBED) {
    const Weight& table = checker.weight(0);
    embed_rows_ = embed_rows_ == 0 ? table.rows : std::min(embed_rows_, table.rows);
  } else if (op.code == KT_OP_ATTENTION) {
    AttentionOp attention;
    attention.layer = op.i[0];
    attention.q_heads = op.i[1];
    attention.kv_heads = op.i[2];
    attention.group = op.i[1] / op.i[2];
    attention.head_dim = op.i[3];
    attention.padded_dim = static_cast<int32_t>(round_up(op.i[3], kLanes));
    attention.half = op.i[4] / 2;
    attention.neox = op.i[5];
    attention.eps = op.f[0];
    attention.scale = op.f[1];
    if (const Weight* w = checker.weight_or_null(0)) {
      attention.q_norm = w->values;
    }
    if (const Weight* w = checker.weight_or_null(1)) {
      attention.k_norm = w->values;
    }
    extra = static_cast<int32_t>(attentions_.size());
    attentions_.push_back(attention);
  } else if (op.code == KT_OP_MOE) {
    MoeOp moe;
    moe.routing.num_experts = checker.weight(1).num_experts;
    moe.routing.top_k = op.i[0];
    moe.routing.sigmoid = op.i[1];
    moe.routing.renormalise = op.i[2];
    moe.routing.groups = op.i[3];
    moe.routing.groups_kept = op.i[4];
    moe.routing.sum_of_two = op.i[5];
    moe.routing.scale = op.f[0] == 0.0f ? 1.0f : op.f[0];
    if (const Weight* w = checker.weight_or_null(4)) {
      moe.routing.bias = w->values;
    }
    moe.router = unpack_values(workers_, arena_, checker.weight(0));
    // weights_ may still grow and move: finish() sets the pointers.
    extra = static_cast<int32_t>(moes_.size());
    moes_.push_back(moe);
  }
  ops_.push_back(op);
  op_extra_.push_back(extra);
}

void Model::finish(int32_t logits_buffer) {
  require_setup("kt_model_finish");
  if (logits_buffer < 0 || logits_buffer >= static_cast<int32_t>(buffers_.size())) {
    fail_argument("logits buffer " + std::to_string(logits_buffer) + " does not exist");
  }
  const Buffer& logits = buffers_[static_cast<size_t>(logits_buffer)];
  if (!logits.by_sample || logits.width != config_.vocab_size) {
    fail_argument("logits buffer " + std::to_string(logits_buffer) + " has width " +
                  std::to_string(logits.width) + " and " + (logits.by_sample ? "S" : "T") +
                  " rows, expected S rows of vocab_size " + std::to_string(config_.vocab_size));
  }
  if (ops_.empty()) {
    fail_argument("the model has no operations");
  }
  Scheduler(*this).build();
  for (size_t i = 0; i < ops_.size(); ++i) {
    if (ops_[i].code != KT_OP_MOE) {
      continue;
    }
    const auto at = [&](int32_t slot) { return &weights_[static_cast<size_t>(ops_[i].w[slot])]; };
    moes_[static_cast<size_t>(op_extra_[i])].weights = {at(1), at(2), at(3)};
  }
  allocate();
  sampler_ = std::make_unique<Sampler>(workers_, *vector_, config_.max_logit_rows,
                                       config_.vocab_size, config_.sample_vocab);
  previous_.reserve(static_cast<size_t>(config_.max_logit_rows));
  tokens_.resize(static_cast<size_t>(config_.max_tokens));
  is_prompt_.resize(static_cast<size_t>(config_.max_tokens));
  runs_.reserve(2 * static_cast<size_t>(config_.max_rows));
  logits_buffer_ = logits_buffer;
  finished_ = true;
}

// Which tokens belong to a prompt: the kernels may multiply them in another way (multiply_prompt).
void Model::find_prompts() {
  runs_.clear();
  const bool has_ways = matrix_->multiply_prompt != nullptr;
  const auto add = [&](int32_t first, int32_t count, bool is_prompt) {
    if (count == 0) {
      return;
    }
    std::memset(is_prompt_.data() + first, is_prompt ? 1 : 0, static_cast<size_t>(count));
    if (!runs_.empty() && runs_.back().is_prompt == is_prompt) {
      runs_.back().count += count;
    } else {
      runs_.push_back({first, count, is_prompt});
    }
  };
  for (int32_t row = 0; row < view_.num_rows; ++row) {
    const int32_t first = view_.row_start[row], count = view_.row_start[row + 1] - first;
    const int32_t prompt = has_ways ? view_.num_prompt[row] : 0;
    add(first, prompt, true);
    add(first + prompt, count - prompt, false);
  }
}

void Model::run(const kt_plan& plan, const kt_block_layout& layout, const void* block,
                kt_sample_out& out) {
  if (!finished_) {
    fail_state("kt_model_run: the model is not finished");
  }
  view_ = view_step(plan, layout, block, config_);
  const auto num_previous = static_cast<int32_t>(previous_.size());
  for (int32_t t = 0; t < view_.num_tokens; ++t) {
    int32_t id = view_.tokens[t];
    if (id < 0 && -1 - id < num_previous) {
      id = previous_[static_cast<size_t>(-1 - id)];
    }
    if (id < 0 || (embed_rows_ > 0 && id >= embed_rows_)) {
      fail_argument("tokens[" + std::to_string(t) + "] is " + std::to_string(view_.tokens[t]) +
                    ", allowed is " + std::to_string(-num_previous) + " .. " +
                    std::to_string(embed_rows_ - 1));
    }
    tokens_[static_cast<size_t>(t)] = id;
  }
  const Buffer& logits = buffers_[static_cast<size_t>(logits_buffer_)];
  sampler_->prepare(view_, logits.data, logits.stride, out);
  find_prompts();
  plan_attention(view_, workers_.num_threads(), attention_);
  for (int32_t i = 0; i < num_tails_; ++i) {
    tails_[i].next.store(0, std::memory_order_relaxed);
  }
  Executor executor(*this);
  executor.run();
  previous_.assign(out.tokens, out.tokens + view_.num_samples);
}

void Model::read(int32_t buffer_id, int32_t first, int32_t count, float* dst) {
  if (!finished_) {
    fail_state("kt_model_read: the model is not finished");
  }
  if (buffer_id < 0 || buffer_id >= static_cast<int32_t>(buffers_.size())) {
    fail_argument("buffer " + std::to_string(buffer_id) + " does not exist");
  }
  const Buffer& buffer = buffers_[static_cast<size_t>(buffer_id)];
  const int32_t rows = buffer.by_sample ? config_.max_logit_rows : config_.max_tokens;
  if (first < 0 || count < 0 || first > rows - count) {
    fail_argument("rows " + std::to_string(first) + " .. " +
                  std::to_string(int64_t{first} + count - 1) + " of buffer " +
                  std::to_string(buffer_id) + " are outside its " + std::to_string(rows));
  }
  if (count > 0) {
    require_handle(dst, "dst");
  }
  for (int32_t i = 0; i < count; ++i) {
    std::memcpy(dst + int64_t{i} * buffer.width, buffer.data + int64_t{first + i} * buffer.stride,
                static_cast<size_t>(buffer.width) * 4);
  }
}

kt_model_stats Model::stats() const {
  kt_model_stats stats = {};
  stats.struct_size = sizeof(stats);
  stats.num_ops = static_cast<int32_t>(ops_.size());
  stats.weight_bytes = weight_bytes_;
  stats.kv_bytes = kv_bytes_;
  stats.buffer_bytes = buffer_bytes_;
  stats.steps = num_runs_;
  stats.run_ns = run_ns_;
  stats.expert_ns = class_ns_[kClassExperts];
  stats.attention_ns = class_ns_[kClassAttention];
  stats.linear_ns = class_ns_[kClassLinear];
  stats.sample_ns = sample_ns_;
  return stats;
}

}  // namespace kt
