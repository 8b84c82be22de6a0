// matrix_avx512vnni.cpp: matrix kernels for AVX-512 with VNNI (u8 x s8 dot products).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/kernels.h"
#include "kernels/layout.h"

#define KT_HAS_VNNI 1
#define KT_HAS_BF16 1

namespace kt {
namespace {

#include "kernels/simd_512.inl"
// The algorithm needs V.
#include "kernels/matrix_simd.inl"

constexpr MatrixKernels kKernels = {3, prepare, multiply_band, nullptr, peak};

}  // namespace

const MatrixKernels* matrix_kernels_avx512vnni() { return &kKernels; }

}  // namespace kt
