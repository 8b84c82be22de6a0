// From logits to token ids and log-probabilities, by all workers.
//
// DESIGN
//  Phase 1: tasks are (logit row, slice of kSlice ids): the row's processed logits (penalties,
//  bias, mask; written only for rows that need them), their maximum, and the raw logits'
//  log-sum-exp. Barrier. Phase 2: tasks are rows: greedy rows pick the best slice, others draw:
//  weights are exp((l - max) / temperature), top_k, then top_p, then min_p decide which ids are
//  kept, and the kept ids are walked in order until the drawn share of their mass is reached.
//  Nothing of vocabulary size is ever sorted: maxima of 64 ids bound the k-th largest value, and a
//  histogram narrows the search for top_p's last token to one bucket. Slices are fixed, so sums do
//  not depend on the number of workers. Order of processing: repetition penalty (Hugging Face:
//  divides positive, multiplies negative logits of every token seen), presence and frequency
//  penalty (OpenAI: generated tokens only), bias, mask, temperature, top_k, top_p, min_p.
//  Log-probabilities are of the raw logits.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "base/arena.h"
#include "experts/tasks.h"
#include "host/workers.h"
#include "kernels/vector.h"
#include "kt.h"
#include "model/step_view.h"

namespace kt {

inline constexpr int32_t kSlice = 16384;
// Ids whose maximum is known while drawing, so that most of the vocabulary is looked at once.
inline constexpr int32_t kDrawChunk = 64;

class Sampler {
 public:
  Sampler(Workers& workers, const VectorKernels& vector, int32_t max_rows, int32_t vocab_size,
          int32_t sample_vocab);

  // Before the job, on the caller's thread: checks indices and result arrays, keeps the arguments.
  void prepare(const StepView& view, const float* logits, int64_t stride, kt_sample_out& out);
  // Inside a job, by every worker.
  void run(int32_t worker);

 private:
  struct SliceResult {
    float best;  // processed maximum and its lowest id
    int32_t best_id;
    float raw_max;
    double raw_sum;  // sum of exp(raw - raw_max)
  };
  struct Candidate {
    float weight;
    int32_t id;
  };
  struct DrawScratch {  // per worker; nothing grows while serving
    std::vector<Candidate> candidates;
    std::vector<float> chunk_max;
    std::vector<float> order;
  };

  bool needs_raw(const kt_sample_params& p) const { return p.num_logprobs >= 0 || p.target >= 0; }
  bool needs_copy(const kt_sample_params& p) const;
  const float* raw(int32_t row) const { return logits_ + row * stride_; }
  float* work(int32_t row) const { return work_ + int64_t{row} * vocab_size_; }
  void process_slice(int32_t row, int32_t slice);
  void copy_slice(const kt_sample_params& p, int32_t row, int32_t first, int32_t last);
  void finish_row(int32_t row, DrawScratch& scratch);
  // sampler_draw.cpp. values: processed logits of the row, overwritten; best: their maximum.
  int32_t draw(const kt_sample_params& p, float* values, float best, int32_t best_id,
               DrawScratch& scratch) const;
  int32_t draw_of_few(const kt_sample_params& p, const float* values, float best, float inverse,
                      DrawScratch& scratch) const;
  int32_t draw_of_all(const kt_sample_params& p, float* weights, float best, float inverse,
                      int32_t best_id, DrawScratch& scratch) const;
  void find_chunk_max(const float* values, DrawScratch& scratch) const;
  void largest(const float* values, int32_t k, DrawScratch& scratch) const;
  Candidate cut_mass(const float* weights, double mass, double total, DrawScratch& scratch) const;
  void write_alternatives(int32_t row, int32_t count, double log_sum);

  Workers& workers_;
  const VectorKernels& vector_;
  const int32_t vocab_size_;
  const int32_t sample_vocab_;
  const int32_t num_slices_;
  Arena arena_;
  float* work_ = nullptr;  // [max_rows, V]; pages of rows that never need it are never touched
  std::vector<SliceResult> slices_;
  std::vector<DrawScratch> scratch_;  // per worker

  const StepView* view_ = nullptr;
  const float* logits_ = nullptr;
  int64_t stride_ = 0;
  kt_sample_out out_ = {};
  TailCounter slice_tasks_;
  TailCounter row_tasks_;
};

}  // namespace kt
