#include "experts/expert_set.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "base/error.h"

namespace kt {
namespace {

constexpr int64_t kSpinsBeforeYield = 4096;  // more than a hundred microseconds

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

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

void ExpertSet::set_up(Run& run, const kt_expert_job& wanted) {
  if (!finished_) {
    fail_state("the expert set is not finished");
  }
  weight(wanted.layer, KT_EXPERTS_GATE);  // checks the layer number
  if (wanted.num_tokens < 0 || wanted.num_tokens > max_tokens_) {
    fail_argument("num_tokens is " + std::to_string(wanted.num_tokens) + ", allowed is 0 .. " +
                  std::to_string(max_tokens_));
  }
  if (wanted.num_spared < 0 || wanted.num_spared > 2) {
    fail_argument("num_spared is " + std::to_string(wanted.num_spared) + ", allowed is 0 .. 2");
  }
  const Layer& l = layers_[static_cast<size_t>(wanted.layer)];
  check_ids(l, wanted.num_tokens, wanted.ids);
  for (int32_t t = 0; t < 2 * workers_.num_nodes(); ++t) {
    tails_[t].next.store(0);
  }
  ExpertJob job;
  job.weights = {&l.gate, &l.up, &l.down};
  job.x = acts_;
  job.x_stride = act_row_bytes(l.gate.act, l.gate.cols);
  job.out = wanted.out;
  job.out_stride = l.down.rows;
  job.used = used_;
  job.num_tokens = wanted.num_tokens;
  job.matrix = matrix_kernels(workers_.isa());
  job.vector = vector_kernels(workers_.isa());
  job.tails = tails_;
  // Somebody of the first node must be left: its share of the weights is nobody else's.
  const auto on_first_node = static_cast<int32_t>(workers_.workers_of(0).last);
  job.first_worker = std::min(wanted.num_spared, on_first_node - 1);
  job.is_prompt = prompt_flags(*job.matrix, wanted.is_prompt);
  run.set = this;
  run.job = job;
  run.x = wanted.x;
  run.ids = wanted.ids;
  run.weights = wanted.weights;
  run.num_experts = l.gate.num_experts;
}

void ExpertSet::run(int32_t layer, int32_t num_tokens, const float* x, const int32_t* ids,
                    const float* weights, const uint8_t* is_prompt, float* out) {
  kt_expert_job wanted{};
  wanted.layer = layer;
  wanted.num_tokens = num_tokens;
  wanted.x = x;
  wanted.ids = ids;
  wanted.weights = weights;
  wanted.is_prompt = is_prompt;
  wanted.out = out;
  if (is_started_) {
    fail_state("a job of the expert set was started and is not joined");
  }
  Run run;
  set_up(run, wanted);
  if (num_tokens > 0) {
    workers_.run(work, &run);
  }
}

void ExpertSet::start(const kt_expert_job& wanted) {
  if (is_started_) {
    fail_state("a job of the expert set was started and is not joined");
  }
  if (wanted.number < 1 || wanted.number > INT32_MAX) {
    fail_argument("number is " + std::to_string(wanted.number) + ", allowed is 1 .. 2147483647");
  }
  if (wanted.timeout_ns < 0) {
    fail_argument("timeout_ns is " + std::to_string(wanted.timeout_ns) + ", at least 0");
  }
  set_up(started_, wanted);
  started_job_ = wanted;
  started_.flags = &started_job_;
  started_.deadline_ns = now_ns() + wanted.timeout_ns;
  started_.left.store(workers_.num_threads() - started_.job.first_worker);
  workers_.start(work, &started_, started_.job.first_worker > 0, ticket_);
  is_started_ = true;
}

bool ExpertSet::join() {
  if (!is_started_) {
    return false;
  }
  is_started_ = false;
  workers_.join(ticket_);
  return true;
}

ExpertSet::~ExpertSet() {
  gives_up_.store(true);
  try {
    join();
  } catch (...) {  // NOLINT(bugprone-empty-catch): nobody is left to be told
  }
}

// A started job always answers: with a failure too, and before anybody joins it, because the GPU
// may be what the thread that would join waits for.
void ExpertSet::work(void* context, int32_t worker) {
  Run& run = *static_cast<Run*>(context);
  try {
    run.set->compute(run, worker);
  } catch (...) {
    if (run.flags != nullptr) {
      std::atomic_ref<uint32_t>(*run.flags->done)
          .store(run.flags->number | KT_EXPERT_JOB_FAILED, std::memory_order_release);
    }
    throw;
  }
}

void ExpertSet::compute(Run& run, int32_t worker) {
  const kt_expert_job* const flags = run.flags;
  const int32_t first = run.job.first_worker;
  group_pairs(run.ids, run.weights, run.job.num_tokens, top_k_, run.num_experts, run.job.is_prompt,
              buffers_.groupings[static_cast<size_t>(worker)]);
  if (worker >= first) {
    fetch_up(workers_, run.job, buffers_, worker);
    if (flags != nullptr && flags->request != nullptr) {
      wait_for_rows(run);
    }
    if (flags != nullptr && flags->times_ns != nullptr && worker == first) {
      flags->times_ns[0] = now_ns();
    }
    prepare(run, worker);
  }
  workers_.barrier();
  run_up(workers_, run.job, buffers_, worker);
  workers_.barrier();
  run_down(workers_, run.job, buffers_, worker);
  if (flags == nullptr || worker < first || run.left.fetch_sub(1) != 1) {
    return;
  }
  // The last one: nobody has to be woken before the GPU can go on.
  if (flags->times_ns != nullptr) {
    flags->times_ns[1] = now_ns();
  }
  std::atomic_ref<uint32_t>(*flags->done).store(flags->number, std::memory_order_release);
}

// Rows are prepared in pieces, so that one row alone is also prepared by several workers.
void ExpertSet::prepare(const Run& run, int32_t worker) {
  const ExpertJob& job = run.job;
  const ActKind act = job.weights.gate->act;
  const int32_t cols = job.weights.gate->cols, spared = job.first_worker;
  const int64_t blocks = (cols + 31) / 32;
  const Range mine =
      split(blocks * job.num_tokens, worker - spared, workers_.num_threads() - spared);
  for (int64_t at = mine.first; at < mine.last;) {
    const int64_t row = at / blocks, first = at % blocks;
    const int64_t count = std::min(blocks - first, mine.last - at);
    const auto column = static_cast<int32_t>(first * 32);
    const auto columns = static_cast<int32_t>(std::min<int64_t>(count * 32, cols - column));
    if (used_[row] != 0) {
      const bool prompt = job.is_prompt != nullptr && job.is_prompt[row] != 0;
      job.matrix->prepare(form_of(act, prompt), run.x + row * cols + column, cols, column, columns,
                          acts_ + row * job.x_stride);
    }
    at += count;
  }
}

void ExpertSet::wait_for_rows(const Run& run) const {
  const std::atomic_ref<uint32_t> request(*run.flags->request);
  for (int64_t spins = 0; request.load(std::memory_order_acquire) != run.flags->number; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
      continue;
    }
    std::this_thread::yield();
    if (gives_up_.load(std::memory_order_relaxed)) {
      throw Error(KT_ERR_STATE, "the expert set was destroyed before the rows of a job came");
    }
    if (now_ns() > run.deadline_ns) {
      throw Error(KT_ERR_INTERNAL, "the GPU did not bring the rows of layer " +
                                       std::to_string(run.flags->layer) + " within " +
                                       std::to_string(run.flags->timeout_ns / 1000000) + " ms");
    }
  }
}

}  // namespace kt
