#include "kernels/vector.h"
#include "kt.h"

namespace kt {

const VectorKernels* vector_kernels(int32_t isa) {
  switch (isa) {
    case KT_ISA_SCALAR:
      return &kVectorScalar;
#if defined(__x86_64__)
    case KT_ISA_AVX2:
      return &kVectorAvx2;
    case KT_ISA_AVX512:
    case KT_ISA_AVX512VNNI:
    case KT_ISA_AMX:
      return &kVectorAvx512;
#endif
    default:
      return nullptr;
  }
}

}  // namespace kt
