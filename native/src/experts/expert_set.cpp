#include "experts/expert_set.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace kt {

ExpertSet::ExpertSet(Workers& workers, int32_t max_tokens, int32_t top_k)
    : workers_(workers), max_tokens_(max_tokens), top_k_(top_k) {
  if (max_tokens < 1 || max_tokens > 1 << 20) {
    fail_argument("max_tokens is " + std::to_string(max_tokens) + ", allowed is 1 .. 1048576");
  }
  if (top_k < 1 || top_k > 64) {
    fail_argument("top_k is " + std::to_string(top_k) + ", allowed is 1 .. 64");
  }
}

void ExpertSet::add(const kt_tensor& gate, const kt_tensor& up, const kt_tensor& down) {
  if (finished_) {
    fail_state("the expert set is finished, no layer can be added");
  }
  Layer layer;
  layer.gate = make_weight(workers_, arena_, gate, KT_WEIGHT_MATRIX);
  layer.up = make_weight(workers_, arena_, up, KT_WEIGHT_MATRIX);
  layer.down = make_weight(workers_, arena_, down, KT_WEIGHT_MATRIX);
  check_expert_weights({&layer.gate, &layer.up, &layer.down}, "expert set");
  layers_.push_back(std::move(layer));
}

void ExpertSet::finish() {
  if (finished_ || layers_.empty()) {
    fail_state("finish needs at least one layer, and only once");
  }
  int64_t acts = 0, mid = 0;
  int32_t experts = 0, cols = 0, rows = 0;
  for (const Layer& layer : layers_) {
    acts = std::max(acts, act_row_bytes(layer.gate.act, layer.gate.cols));
    mid = std::max(mid, act_row_bytes(layer.down.act, layer.down.cols));
    experts = std::max(experts, layer.gate.num_experts);
    cols = std::max({cols, layer.gate.cols, layer.down.cols});
    rows = std::max(rows, layer.down.rows);
  }
  allocate_expert_buffers(workers_, arena_, int64_t{max_tokens_} * top_k_, experts, mid, cols, rows,
                          buffers_);
  acts_ = arena_.allocate(acts * max_tokens_);
  used_ = arena_.allocate_array<uint8_t>(max_tokens_);
  tails_ = arena_.allocate_array<TailCounter>(2 * workers_.num_nodes());
  finished_ = true;
}

const Weight& ExpertSet::weight(int32_t layer, int32_t which) const {
  if (layer < 0 || layer >= num_layers()) {
    fail_argument("layer is " + std::to_string(layer) + ", the set has " +
                  std::to_string(num_layers()));
  }
  const Layer& found = layers_[static_cast<size_t>(layer)];
  switch (which) {
    case KT_EXPERTS_GATE:
      return found.gate;
    case KT_EXPERTS_UP:
      return found.up;
    case KT_EXPERTS_DOWN:
      return found.down;
    default:
      fail_argument("which is " + std::to_string(which) + ", allowed is 0 .. 2");
  }
}

void ExpertSet::check_ids(const Layer& layer, int32_t num_tokens, const int32_t* ids) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    int32_t all = -1;  // stays -1 when every id is
    for (int64_t i = t * top_k_; i < (t + 1) * top_k_; ++i) {
      if (ids[i] < -1 || ids[i] >= layer.gate.num_experts) {
        fail_argument("expert id " + std::to_string(ids[i]) + " of token " + std::to_string(t) +
                      " is outside 0 .. " + std::to_string(layer.gate.num_experts - 1));
      }
      all &= ids[i];
    }
    used_[t] = all != -1;
  }
}

void ExpertSet::spare(int32_t num_workers) {
  if (num_workers < 0 || num_workers > 2) {
    fail_argument("num_workers is " + std::to_string(num_workers) + ", allowed is 0 .. 2");
  }
  num_spared_ = std::min(num_workers, workers_.num_threads() - 1);
}

void ExpertSet::run(int32_t layer, int32_t num_tokens, const float* x, const int32_t* ids,
                    const float* weights, const uint8_t* is_prompt, float* out) {
  if (!finished_) {
    fail_state("the expert set is not finished");
  }
  weight(layer, KT_EXPERTS_GATE);  // checks the layer number
  if (num_tokens < 0 || num_tokens > max_tokens_) {
    fail_argument("num_tokens is " + std::to_string(num_tokens) + ", allowed is 0 .. " +
                  std::to_string(max_tokens_));
  }
  if (num_tokens == 0) {
    return;
  }
  const Layer& l = layers_[static_cast<size_t>(layer)];
  check_ids(l, num_tokens, ids);
  for (int32_t t = 0; t < 2 * workers_.num_nodes(); ++t) {
    tails_[t].next.store(0);
  }
  ExpertJob job;
  job.weights = {&l.gate, &l.up, &l.down};
  job.x = acts_;
  job.x_stride = act_row_bytes(l.gate.act, l.gate.cols);
  job.out = out;
  job.out_stride = l.down.rows;
  job.used = used_;
  job.num_tokens = num_tokens;
  job.matrix = matrix_kernels(workers_.isa());
  job.vector = vector_kernels(workers_.isa());
  job.tails = tails_;
  job.first_worker = num_spared_;
  job.is_prompt = prompt_flags(*job.matrix, is_prompt);
  const int32_t cols = l.gate.cols, threads = workers_.num_threads();
  // Pieces of rows, so that one row alone is also prepared by several workers.
  const int64_t blocks = (cols + 31) / 32;
  workers_.for_each([&](int32_t worker) {
    const int32_t spared = num_spared_;
    const Range mine =
        worker < spared ? Range{} : split(blocks * num_tokens, worker - spared, threads - spared);
    for (int64_t at = mine.first; at < mine.last;) {
      const int64_t row = at / blocks, first = at % blocks;
      const int64_t count = std::min(blocks - first, mine.last - at);
      const auto column = static_cast<int32_t>(first * 32);
      const auto columns = static_cast<int32_t>(std::min<int64_t>(count * 32, cols - column));
      if (used_[row] != 0) {
        const bool prompt = job.is_prompt != nullptr && job.is_prompt[row] != 0;
        job.matrix->prepare(form_of(l.gate.act, prompt), x + row * cols + column, cols, column,
                            columns, acts_ + row * job.x_stride);
      }
      at += count;
    }
    group_pairs(ids, weights, num_tokens, top_k_, l.gate.num_experts, job.is_prompt,
                buffers_.groupings[static_cast<size_t>(worker)]);
    workers_.barrier();
    run_up(workers_, job, buffers_, worker);
    workers_.barrier();
    run_down(workers_, job, buffers_, worker);
  });
}

}  // namespace kt
