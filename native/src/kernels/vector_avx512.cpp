// Vector kernels for AVX-512: a group of 16 floats is one register.
#if defined(__AVX512F__)
// gcc 12's own intrinsics header passes undefined operands on purpose and then warns about them.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/vector.h"
#include "kt.h"

namespace kt {
namespace {

using Vec = __m512;

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline __mmask16 first(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u);
}

inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec load_part(const float* p, int n, float rest) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(rest), first(n), p);
}
inline void store_part(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline Vec scale2(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
inline Vec keep_first(Vec a, int n, Vec rest) { return _mm512_mask_blend_ps(first(n), rest, a); }
inline uint16_t float_to_half(float value) {
  const __m128i half = _mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT);
  return static_cast<uint16_t>(_mm_cvtsi128_si32(half));
}
inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
// The tree of the scalar table: halves first, down to one lane.
inline float reduce_add(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
inline uint32_t equal_mask(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

// 32 registers.
constexpr bool kManyRegisters = true;

#define KT_VECTOR_ISA KT_ISA_AVX512
#include "kernels/vector_body.inl"
#undef KT_VECTOR_ISA

}  // namespace

const VectorKernels kVectorAvx512 = kTable;

}  // namespace kt
#endif
