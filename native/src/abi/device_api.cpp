// Entry points of the expert set and of GPU decode steps.
#include <memory>

#include "abi/matrix_handle.h"
#include "base/error.h"
#include "device/cudart.h"
#include "device/handoff.h"
#include "experts/expert_set.h"
#include "kt.h"

struct kt_expert_set {
  kt::ExpertSet experts;
};

struct kt_handoff {
  kt::Handoff handoff;
};

namespace {

void describe_part(const kt::Matrix& matrix, int32_t rows, int32_t first_band, size_t num_parts,
                   kt_packed_part* out) {
  out->type = matrix.type;
  out->num_experts = matrix.num_experts;
  out->rows = rows;
  out->cols = matrix.cols;
  out->num_bands = matrix.num_bands;
  out->first_band = first_band;
  out->num_parts = static_cast<int32_t>(num_parts);
  out->band_bytes = matrix.band_bytes;
  out->expert_bytes = matrix.expert_bytes;
  out->data = matrix.data;
}

}  // namespace

extern "C" {

int32_t kt_expert_set_create(kt_pool* pool, int32_t max_tokens, int32_t top_k,
                             kt_expert_set** out) {
  return kt::guard([&] {
    kt::require_handle(pool, "pool");
    kt::require_handle(out, "out");
    *out = new kt_expert_set{{pool->workers, max_tokens, top_k}};
    return KT_OK;
  });
}

int32_t kt_expert_set_destroy(kt_expert_set* set) {
  return kt::guard([&] {
    delete set;
    return KT_OK;
  });
}

int32_t kt_expert_set_add(kt_expert_set* set, const kt_tensor* gate, const kt_tensor* up,
                          const kt_tensor* down) {
  return kt::guard([&] {
    kt::require_handle(set, "set");
    kt::require_struct(gate, "gate");
    kt::require_struct(up, "up");
    kt::require_struct(down, "down");
    set->experts.add(*gate, *up, *down);
    return KT_OK;
  });
}

int32_t kt_expert_set_finish(kt_expert_set* set) {
  return kt::guard([&] {
    kt::require_handle(set, "set");
    set->experts.finish();
    return KT_OK;
  });
}

int32_t kt_expert_set_part(const kt_expert_set* set, int32_t layer, int32_t which, int32_t part,
                           kt_packed_part* out) {
  return kt::guard([&] {
    kt::require_handle(set, "set");
    kt::require_struct(out, "kt_packed_part");
    const kt::Weight& weight = set->experts.weight(layer, which);
    const auto count = static_cast<int32_t>(weight.parts.size());
    if (part < 0 || part >= count) {
      kt::fail_argument("part is " + std::to_string(part) + ", the tensor has " +
                        std::to_string(count));
    }
    const kt::WeightPart& found = weight.parts[static_cast<size_t>(part)];
    describe_part(found.matrix, weight.rows, found.first_band, weight.parts.size(), out);
    return KT_OK;
  });
}

int32_t kt_expert_set_run(kt_expert_set* set, int32_t layer, int32_t num_tokens, const float* x,
                          const int32_t* ids, const float* weights, float* out,
                          const uint8_t* is_prompt) {
  return kt::guard([&] {
    kt::require_handle(set, "set");
    kt::require_handle(x, "x");
    kt::require_handle(ids, "ids");
    kt::require_handle(weights, "weights");
    kt::require_handle(out, "out");
    set->experts.run(layer, num_tokens, x, ids, weights, is_prompt, out);
    return KT_OK;
  });
}

int32_t kt_expert_set_start(kt_expert_set* set, const kt_expert_job* job) {
  return kt::guard([&] {
    kt::require_handle(set, "set");
    kt::require_struct(job, "kt_expert_job");
    kt::require_handle(job->x, "x");
    kt::require_handle(job->ids, "ids");
    kt::require_handle(job->weights, "weights");
    kt::require_handle(job->out, "out");
    kt::require_handle(job->done, "done");
    set->experts.start(*job);
    return KT_OK;
  });
}

int32_t kt_expert_set_join(kt_expert_set* set) {
  return kt::guard([&] {
    kt::require_handle(set, "set");
    return set->experts.join() ? KT_OK : KT_IDLE;
  });
}

int32_t kt_matrix_part(const kt_matrix* matrix, kt_packed_part* out) {
  return kt::guard([&] {
    kt::require_handle(matrix, "matrix");
    kt::require_struct(out, "kt_packed_part");
    describe_part(matrix->view, matrix->view.rows, 0, 1, out);
    return KT_OK;
  });
}

int32_t kt_copy_to_device(void* stream, const kt_copy* copies, int32_t num_copies) {
  return kt::guard([&] {
    kt::require_handle(copies, "copies");
    kt::copy_to_device(stream, copies, num_copies);
    return KT_OK;
  });
}

int32_t kt_handoff_create(const kt_handoff_config* config, kt_expert_set* set, kt_handoff** out) {
  return kt::guard([&] {
    kt::require_struct(config, "kt_handoff_config");
    kt::require_handle(out, "out");
    kt::ExpertSet* experts = set == nullptr ? nullptr : &set->experts;
    *out = new kt_handoff{kt::Handoff(*config, experts)};
    return KT_OK;
  });
}

int32_t kt_handoff_destroy(kt_handoff* handoff) {
  return kt::guard([&] {
    delete handoff;
    return KT_OK;
  });
}

int32_t kt_handoff_await(kt_handoff* handoff, int32_t layer, void* stream) {
  return kt::guard([&] {
    kt::require_handle(handoff, "handoff");
    handoff->handoff.await(layer, stream);
    return KT_OK;
  });
}

int32_t kt_handoff_run(kt_handoff* handoff, kt_gpu_step* step) {
  return kt::guard([&] {
    kt::require_handle(handoff, "handoff");
    kt::require_struct(step, "kt_gpu_step");
    handoff->handoff.run(*step);
    return KT_OK;
  });
}

}  // extern "C"
