// kt_sample: the sampler without a model.
#include "base/error.h"
#include "host/workers.h"
#include "kernels/vector.h"
#include "kt.h"
#include "model/sampler.h"
#include "model/step_view.h"

extern "C" int32_t kt_sample(kt_pool* pool, const float* logits, int32_t vocab_size,
                             int32_t sample_vocab, const kt_plan* plan,
                             const kt_block_layout* layout, const void* block, kt_sample_out* out) {
  return kt::guard([&] {
    kt::require_handle(pool, "pool");
    kt::require_struct(plan, "kt_plan");
    kt::require_struct(layout, "kt_block_layout");
    kt::require_struct(out, "kt_sample_out");
    const kt::StepView view = kt::view_samples(*plan, *layout, block);
    if (view.num_samples == 0) {
      return KT_OK;
    }
    kt::require_handle(logits, "logits");
    kt::Workers& workers = pool->workers;
    kt::Sampler sampler(workers, *kt::vector_kernels(workers.isa()), view.num_samples, vocab_size,
                        sample_vocab);
    sampler.prepare(view, logits, vocab_size, *out);
    workers.for_each([&](int32_t worker) { sampler.run(worker); });
    return KT_OK;
  });
}
