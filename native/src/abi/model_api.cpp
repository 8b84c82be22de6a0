// kt_model_*: argument checks and translation; the work is in model/.
#include <memory>

#include "base/error.h"
#include "host/workers.h"
#include "kt.h"
#include "model/model.h"

extern "C" {

int32_t kt_model_create(const kt_model_config* config, kt_pool* pool, kt_model** out) {
  return kt::guard([&] {
    kt::require_struct(config, "kt_model_config");
    kt::require_handle(pool, "pool");
    kt::require_handle(out, "out");
    *out = nullptr;
    *out = new kt_model(*config, pool->workers);
    return KT_OK;
  });
}

int32_t kt_model_destroy(kt_model* model) {
  return kt::guard([&] {
    delete model;
    return KT_OK;
  });
}

int32_t kt_model_add_buffer(kt_model* model, int32_t width, int32_t by_sample, int32_t* buffer_id) {
  return kt::guard([&] {
    kt::require_handle(model, "model");
    kt::require_handle(buffer_id, "buffer_id");
    *buffer_id = model->model.add_buffer(width, by_sample);
    return KT_OK;
  });
}

int32_t kt_model_add_weight(kt_model* model, const kt_tensor* tensor, int32_t kind,
                            int32_t* weight_id) {
  return kt::guard([&] {
    kt::require_handle(model, "model");
    kt::require_struct(tensor, "kt_tensor");
    kt::require_handle(weight_id, "weight_id");
    *weight_id = model->model.add_weight(*tensor, kind);
    return KT_OK;
  });
}

int32_t kt_model_add_op(kt_model* model, const kt_op* op) {
  return kt::guard([&] {
    kt::require_handle(model, "model");
    kt::require_struct(op, "kt_op");
    model->model.add_op(*op);
    return KT_OK;
  });
}

int32_t kt_model_finish(kt_model* model, int32_t logits_buffer) {
  return kt::guard([&] {
    kt::require_handle(model, "model");
    model->model.finish(logits_buffer);
    return KT_OK;
  });
}

int32_t kt_model_run(kt_model* model, const kt_plan* plan, const kt_block_layout* layout,
                     const void* block, kt_sample_out* out) {
  return kt::guard([&] {
    kt::require_handle(model, "model");
    kt::require_struct(plan, "kt_plan");
    kt::require_struct(layout, "kt_block_layout");
    kt::require_struct(out, "kt_sample_out");
    model->model.run(*plan, *layout, block, *out);
    return KT_OK;
  });
}

int32_t kt_model_read(kt_model* model, int32_t buffer_id, int32_t first, int32_t count,
                      float* dst) {
  return kt::guard([&] {
    kt::require_handle(model, "model");
    model->model.read(buffer_id, first, count, dst);
    return KT_OK;
  });
}

int32_t kt_model_query(const kt_model* model, kt_model_stats* out) {
  return kt::guard([&] {
    kt::require_handle(model, "model");
    kt::require_struct(out, "kt_model_stats");
    *out = model->model.stats();
    return KT_OK;
  });
}

}  // extern "C"
