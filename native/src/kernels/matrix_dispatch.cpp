// matrix_dispatch.cpp: which matrix kernels this build has. Each ISA file exports one getter.
#include "kernels/kernels.h"
#include "kt.h"

namespace kt {

const MatrixKernels* matrix_kernels_scalar();
#if defined(__x86_64__)
const MatrixKernels* matrix_kernels_avx2();
const MatrixKernels* matrix_kernels_avx512();
const MatrixKernels* matrix_kernels_avx512vnni();
const MatrixKernels* matrix_kernels_amx();
#endif

const MatrixKernels* matrix_kernels(int32_t isa) {
  switch (isa) {
    case KT_ISA_SCALAR:
      return matrix_kernels_scalar();
#if defined(__x86_64__)
    case KT_ISA_AVX2:
      return matrix_kernels_avx2();
    case KT_ISA_AVX512:
      return matrix_kernels_avx512();
    case KT_ISA_AVX512VNNI:
      return matrix_kernels_avx512vnni();
    case KT_ISA_AMX:
      return matrix_kernels_amx();
#endif
    default:
      return nullptr;
  }
}

}  // namespace kt
