// matrix_avx512.cpp: matrix kernels for AVX-512 without VNNI: products are summed in 16 bits first.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/kernels.h"
#include "kernels/layout.h"

#define KT_HAS_VNNI 0
#define KT_HAS_BF16 0

namespace kt {
namespace {

#include "kernels/simd_512.inl"
// The algorithm needs V.
#include "kernels/matrix_simd.inl"

constexpr MatrixKernels kKernels = {2, prepare, multiply_band, nullptr, peak};

}  // namespace

const MatrixKernels* matrix_kernels_avx512() { return &kKernels; }

}  // namespace kt
