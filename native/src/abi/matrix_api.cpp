// Entry points for tensor types and single packed matrices (tests, benchmarks, kt_experts_multiply).
#include <cstring>
#include <string>
#include <vector>

#include "abi/matrix_handle.h"
#include "base/error.h"
#include "kernels/pack_tensor.h"

namespace kt {
namespace {

const TypeTraits& require_type(int32_t type) {
  const TypeTraits* traits = type_traits(type);
  if (traits == nullptr) {
    fail_unsupported("tensor type " + std::to_string(type) + " is unknown to this build");
  }
  return *traits;
}

uint8_t* allocate(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  return static_cast<uint8_t*>(memory);
}

}  // namespace
}  // namespace kt

extern "C" {

int32_t kt_type_query(int32_t type, kt_type_info* out) {
  return kt::guard([&] {
    kt::require_struct(out, "kt_type_info");
    const kt::TypeTraits& traits = kt::require_type(type);
    *out = kt_type_info{};
    out->struct_size = sizeof(kt_type_info);
    out->type = type;
    out->block_size = traits.block_size;
    out->block_bytes = traits.block_bytes;
    out->has_kernel = traits.has_kernel;
    std::strncpy(out->name, traits.name, sizeof(out->name) - 1);
    return KT_OK;
  });
}

int32_t kt_dequantize(int32_t type, const void* src, int64_t num_weights, float* dst) {
  return kt::guard([&] {
    const kt::TypeTraits& traits = kt::require_type(type);
    if (num_weights < 0 || num_weights % traits.block_size != 0) {
      kt::fail_argument("num_weights is " + std::to_string(num_weights) +
                        ", not a multiple of the " + traits.name + " block of " +
                        std::to_string(traits.block_size));
    }
    if (num_weights == 0) return KT_OK;
    kt::require_handle(src, "src");
    kt::require_handle(dst, "dst");
    kt::dequantize_row(type, static_cast<const uint8_t*>(src), num_weights, dst);
    return KT_OK;
  });
}

int32_t kt_matrix_create(kt_pool* pool, const kt_tensor* tensor, kt_matrix** out) {
  return kt::guard([&] {
    kt::require_struct(tensor, "kt_tensor");
    kt::require_handle(out, "out");
    auto matrix = std::make_unique<kt_matrix>();
    matrix->pool = pool;
    matrix->view = kt::describe_matrix(*tensor);
    matrix->gguf_bytes = tensor->num_bytes;
    matrix->data.reset(kt::allocate(matrix->view.expert_bytes * matrix->view.num_experts));
    matrix->view.data = matrix->data.get();
    kt::pack_bands(*tensor, matrix->view, 0,
                   static_cast<int64_t>(matrix->view.num_bands) * matrix->view.num_experts,
                   matrix->data.get());
    *out = matrix.release();
    return KT_OK;
  });
}

int32_t kt_matrix_destroy(kt_matrix* matrix) {
  return kt::guard([&] {
    delete matrix;
    return KT_OK;
  });
}

int32_t kt_matrix_unpack(const kt_matrix* matrix, void* dst, int64_t capacity) {
  return kt::guard([&] {
    kt::require_handle(matrix, "matrix");
    kt::require_handle(dst, "dst");
    if (capacity < matrix->gguf_bytes) {
      kt::fail_argument("capacity is " + std::to_string(capacity) + " bytes, the tensor has " +
                        std::to_string(matrix->gguf_bytes));
    }
    const kt::Matrix& w = matrix->view;
    const int64_t row_bytes = matrix->gguf_bytes / w.num_experts / w.rows;
    auto* to = static_cast<uint8_t*>(dst);
    for (int32_t expert = 0; expert < w.num_experts; ++expert) {
      for (int32_t band = 0; band < w.num_bands; ++band) {
        const int32_t left = w.rows - band * kt::kBandRows;
        const int32_t count = left < kt::kBandRows ? left : kt::kBandRows;
        kt::unpack_band(w.type, w.cols, kt::band_at(w, expert, band), row_bytes, count, to);
        to += count * row_bytes;
      }
    }
    return KT_OK;
  });
}

int32_t kt_matrix_multiply(const kt_matrix* matrix, int32_t expert, const float* x,
                           int32_t num_rows, float* out) {
  return kt::guard([&] {
    kt::require_handle(matrix, "matrix");
    const kt::Matrix& w = matrix->view;
    if (expert < 0 || expert >= w.num_experts) {
      kt::fail_argument("expert is " + std::to_string(expert) + ", the matrix has " +
                        std::to_string(w.num_experts));
    }
    if (num_rows < 0) kt::fail_argument("num_rows is " + std::to_string(num_rows));
    if (num_rows == 0) return KT_OK;
    kt::require_handle(x, "x");
    kt::require_handle(out, "out");
    const kt::MatrixKernels* kernels = kt::matrix_kernels(KT_ISA_SCALAR);
    const int64_t stride = kt::act_row_bytes(w.act, w.cols);
    const std::unique_ptr<uint8_t, FreeDeleter> acts(kt::allocate(stride * num_rows));
    const std::unique_ptr<uint8_t, FreeDeleter> scratch(
        kt::allocate(kt::multiply_scratch_bytes(w.cols)));
    const std::unique_ptr<uint8_t, FreeDeleter> block(kt::allocate(64 * int64_t{num_rows}));
    for (int32_t i = 0; i < num_rows; ++i) {
      kernels->prepare(w.act, x + int64_t{i} * w.cols, w.cols, 0, w.cols, acts.get() + i * stride);
    }
    auto* sums = reinterpret_cast<float*>(block.get());
    for (int32_t band = 0; band < w.num_bands; ++band) {
      kernels->multiply_band(w, expert, band, acts.get(), stride, nullptr, num_rows, sums,
                             kt::kBandRows, scratch.get());
      const int32_t left = w.rows - band * kt::kBandRows;
      const int32_t count = left < kt::kBandRows ? left : kt::kBandRows;
      for (int32_t i = 0; i < num_rows; ++i) {
        std::memcpy(out + int64_t{i} * w.rows + band * kt::kBandRows, sums + 16 * i,
                    static_cast<size_t>(count) * 4);
      }
    }
    return KT_OK;
  });
}

}  // extern "C"
