// matrix_amx.cpp: matrix kernels for AMX: bf16 tiles for prompt tokens and for BF16 weights, the
// AVX-512 VNNI kernels for the rest.
//
// A worker that runs these must have permission to use tile state (host/features.cpp asks for it).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/kernels.h"
#include "kernels/layout.h"

#define KT_HAS_VNNI 1

namespace kt {

const MatrixKernels* matrix_kernels_avx512vnni();

namespace {

#include "kernels/simd_512.inl"
// The formats need V,
#include "kernels/formats_simd.inl"
// the rest needs them.
#include "kernels/band_job.inl"
#include "kernels/tiles_amx.inl"
#include "kernels/tiles_dequant.inl"
#include "kernels/tiles_prompt.inl"

void prepare_amx(ActKind kind, const float* x, int32_t cols, int32_t first, int32_t count,
                 uint8_t* dst) {
  if (kind == kActBf16) {
    prepare_prompt(x, first, count, dst);
    return;
  }
  matrix_kernels_avx512vnni()->prepare(kind, x, cols, first, count, dst);
  if (kind == kActF32) {
    prepare_bf16(x, cols, first, count, dst);
  }
}

void multiply_amx(const Matrix& w, int32_t expert, int32_t band, const uint8_t* acts,
                  int64_t act_stride, const int32_t* rows, int32_t m, float* out,
                  int64_t out_stride, void* scratch, const uint8_t* next) {
  if (w.type == kBF16) {
    multiply_bf16(
        {&w, band_at(w, expert, band), acts, act_stride, rows, m, out, out_stride, scratch, next});
    return;
  }
  matrix_kernels_avx512vnni()->multiply_band(w, expert, band, acts, act_stride, rows, m, out,
                                             out_stride, scratch, next);
}

int64_t peak_amx(int32_t kind, int64_t rounds) {
  return kind == 2 ? matrix_kernels_avx512vnni()->peak(kind, rounds) : peak(kind, rounds);
}

constexpr MatrixKernels kKernels = {4, prepare_amx, multiply_amx, multiply_prompt, peak_amx};

}  // namespace

const MatrixKernels* matrix_kernels_amx() { return &kKernels; }

}  // namespace kt
