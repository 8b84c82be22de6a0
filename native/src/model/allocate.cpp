// Memory of a finished model: step buffers, KV pages, scratch. Runs once, in Model::finish();
// nothing is allocated afterwards.
#include <algorithm>

#include "base/error.h"
#include "model/model.h"

namespace kt {

void Model::allocate() {
  for (Buffer& b : buffers_) {
    const int64_t rows = b.by_sample ? config_.max_logit_rows : config_.max_tokens;
    b.data = arena_.allocate_array<float>(rows * b.stride);
    buffer_bytes_ += rows * b.stride * 4;
    for (int32_t kind = 0; kind < kNumActKinds; ++kind) {
      if (b.act_stride[kind] == 0) {
        continue;
      }
      b.acts[kind] = arena_.allocate(rows * b.act_stride[kind]);
      buffer_bytes_ += rows * b.act_stride[kind];
    }
  }
  allocate_attention();
  allocate_scratch();
  tails_ = arena_.allocate_array<TailCounter>(std::max(num_tails_, 1));
}

void Model::allocate_attention() {
  const int64_t positions = int64_t{config_.num_pages} * config_.page_size;
  const int64_t element = config_.kv_type == KT_KV_F32 ? 4 : 2;
  int32_t max_width = 0;
  int32_t max_padded = 0;
  int32_t max_heads = 1;
  std::vector<int32_t> layers;
  for (size_t i = 0; i < ops_.size(); ++i) {
    if (ops_[i].code != KT_OP_ATTENTION) {
      continue;
    }
    AttentionOp& op = attentions_[static_cast<size_t>(op_extra_[i])];
    if (std::find(layers.begin(), layers.end(), op.layer) != layers.end()) {
      fail_argument("two attention operations use KV layer " + std::to_string(op.layer));
    }
    layers.push_back(op.layer);
    op.key_page = int64_t{config_.page_size} * op.head_dim * element;
    op.value_page = int64_t{config_.page_size} * op.padded_dim * element;
    const int64_t pages = int64_t{config_.num_pages} * op.kv_heads;
    op.keys = arena_.allocate(pages * op.key_page);
    op.values = arena_.allocate(pages * op.value_page);
    kv_bytes_ += pages * (op.key_page + op.value_page);
    max_width = std::max(max_width, op.q_heads * op.head_dim);
    max_padded = std::max(max_padded, op.padded_dim);
    max_heads = std::max(max_heads, op.kv_heads);

    auto& shapes = attention_.shapes;
    auto shape = std::find_if(shapes.begin(), shapes.end(), [&](const AttentionShape& known) {
      return known.group == op.group && known.kv_heads == op.kv_heads;
    });
    op.shape = static_cast<int32_t>(shape - shapes.begin());
    if (shape == shapes.end()) {
      shapes.push_back({});
      shapes.back().group = op.group;
      shapes.back().kv_heads = op.kv_heads;
    }
    if (op.half == 0) {
      continue;
    }
    const float multiplier = ops_[i].f[2] == 0.0f ? 1.0f : ops_[i].f[2];
    const float* frequencies = weights_[static_cast<size_t>(ops_[i].w[2])].values;
    auto& ropes = attention_.ropes;
    auto rope = std::find_if(ropes.begin(), ropes.end(), [&](const RopeTable& known) {
      return known.frequencies == frequencies && known.multiplier == multiplier;
    });
    op.rope_table = static_cast<int32_t>(rope - ropes.begin());
    if (rope == ropes.end()) {
      RopeTable table;
      table.frequencies = frequencies;
      table.half = op.half;
      table.multiplier = multiplier;
      table.cos = arena_.allocate_array<float>(int64_t{config_.max_tokens} * op.half);
      table.sin = arena_.allocate_array<float>(int64_t{config_.max_tokens} * op.half);
      ropes.push_back(table);
    }
  }
  if (layers.empty()) {
    return;
  }
  attention_.queries = arena_.allocate_array<float>(int64_t{config_.max_tokens} * max_width);
  attention_.partial_stride = partial_floats(max_padded);
  // Few rows are split at a time; the pages behind unused partial results are never touched.
  attention_.max_splits = 4 * workers_.num_threads();
  const int64_t segments = (positions + kSegment - 1) / kSegment + attention_.max_splits;
  attention_.max_partials = static_cast<int32_t>(std::min<int64_t>(segments, 4096));
  attention_.partials = arena_.allocate_array<float>(int64_t{max_heads} * attention_.max_partials *
                                                     attention_.partial_stride);
  attention_.done =
      arena_.allocate_array<std::atomic<int32_t>>(int64_t{max_heads} * attention_.max_splits);
  // No allocation while serving: a step has at most this many units.
  const int64_t units = int64_t{config_.max_tokens} + config_.max_rows + attention_.max_partials;
  for (AttentionShape& shape : attention_.shapes) {
    shape.units.reserve(static_cast<size_t>(units));
  }
}

void Model::allocate_scratch() {
  int32_t max_cols = 1;
  int32_t max_group_rows = 0;
  int64_t max_padded = 0;
  int32_t max_experts = 0;
  int32_t max_rows = 0;
  int32_t max_top_k = 0;
  int64_t mid_bytes = 0;
  int64_t max_stride = kLanes;
  for (const Weight& w : weights_) {
    if (w.kind == KT_WEIGHT_MATRIX) {
      max_cols = std::max(max_cols, w.cols);
    }
  }
  for (const Buffer& b : buffers_) {
    max_stride = std::max<int64_t>(max_stride, b.stride);
  }
  for (const MoeOp& moe : moes_) {
    const Weight& down = *moe.weights.down;
    max_experts = std::max(max_experts, moe.routing.num_experts);
    max_rows = std::max(max_rows, down.rows);
    max_top_k = std::max(max_top_k, moe.routing.top_k);
    mid_bytes = std::max(mid_bytes, act_row_bytes(down.act, down.cols));
  }
  for (const AttentionOp& op : attentions_) {
    max_padded = std::max<int64_t>(max_padded, op.padded_dim);
    max_group_rows = kQueryRows;
  }
  const int64_t rows = std::max(config_.max_tokens, config_.max_logit_rows);
  if (!moes_.empty()) {
    allocate_expert_buffers(workers_, arena_, rows * max_top_k, max_experts, mid_bytes, max_cols,
                            max_rows, experts_);
    router_logits_ = arena_.allocate_array<float>(rows * max_experts);
    expert_ids_ = arena_.allocate_array<int32_t>(rows * max_top_k);
    expert_weights_ = arena_.allocate_array<float>(rows * max_top_k);
  }
  for (int32_t worker = 0; worker < workers_.num_threads(); ++worker) {
    WorkerScratch s;
    s.row = arena_.allocate_array<float>(kPrivateRows * max_stride);
    for (int32_t kind = 0; kind < kNumActKinds; ++kind) {
      const auto bytes =
          act_row_bytes(static_cast<ActKind>(kind), static_cast<int32_t>(max_stride));
      s.acts[kind] = arena_.allocate(kPrivateRows * bytes);
    }
    s.temp = arena_.allocate_array<float>(kLinearRows * kPromptBands * kBandRows);
    s.multiply = arena_.allocate(multiply_scratch_bytes(max_cols));
    s.choice = arena_.allocate_array<float>(2 * int64_t{std::max(max_experts, 1)});
    s.ids = arena_.allocate_array<int32_t>(kPrivateRows * int64_t{std::max(max_top_k, 1)});
    s.weights = arena_.allocate_array<float>(kPrivateRows * int64_t{std::max(max_top_k, 1)});
    if (max_group_rows > 0) {
      s.attention.state = arena_.allocate_array<float>(attention_.partial_stride);
      s.attention.part = arena_.allocate_array<float>(attention_.partial_stride);
      s.attention.scores = arena_.allocate_array<float>(int64_t{kQueryRows} * kBlockPositions);
      s.attention.head = arena_.allocate_array<float>(max_padded);
      s.attention.limits = arena_.allocate_array<int32_t>(kQueryRows);
    }
    scratch_.push_back(s);
  }
}

}  // namespace kt
