// matrix_amx.cpp: matrix kernels for AMX: tiles where many rows share a weight (int8) and for all
// BF16 products, the AVX-512 VNNI kernels for the rest.
//
// A worker that runs these must have permission to use tile state (host/features.cpp asks for it).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/kernels.h"
#include "kernels/layout.h"

#define KT_HAS_VNNI 1
#define KT_HAS_BF16 1
#define KT_HAS_AMX 1

namespace kt {

const MatrixKernels* matrix_kernels_avx512vnni();

namespace {

#include "kernels/simd_512.inl"
// The algorithm needs V.
#include "kernels/matrix_simd.inl"

void prepare_amx(ActKind kind, const float* x, int32_t cols, int32_t first, int32_t count,
                 uint8_t* dst) {
  prepare(kind, x, cols, first, count, dst);
  if (kind == kActF32) {
    prepare_bf16(x, cols, first, count, dst);
  }
}

void multiply_amx(const Matrix& w, int32_t expert, int32_t band, const uint8_t* acts,
                  int64_t act_stride, const int32_t* rows, int32_t m, float* out,
                  int64_t out_stride, void* scratch, const uint8_t* next) {
  // Tiles take 16 rows, VNNI registers 8, both give the same bits, and a row costs about the same:
  // 16 threads of a Xeon reach 1320 GMAC/s with tiles and 1200 with VNNI for 64 rows of Q4_K, 1380
  // and 1250 for Q8_0 (bench/kernels.py), because scaling every 32 columns, not the tile unit
  // (17000), is the limit. So tiles where the last one is more than half full.
  const bool tiles =
      w.type == kBF16 || (w.act == kActQ8 && m > V::kMaxM && (m - 1) % 16 >= V::kMaxM);
  const auto multiply = tiles ? multiply_band : matrix_kernels_avx512vnni()->multiply_band;
  multiply(w, expert, band, acts, act_stride, rows, m, out, out_stride, scratch, next);
}

int64_t peak_amx(int32_t kind, int64_t rounds) {
  return kind == 2 ? matrix_kernels_avx512vnni()->peak(kind, rounds) : peak(kind, rounds);
}

constexpr MatrixKernels kKernels = {4, prepare_amx, multiply_amx, peak_amx};

}  // namespace

const MatrixKernels* matrix_kernels_amx() { return &kKernels; }

}  // namespace kt
