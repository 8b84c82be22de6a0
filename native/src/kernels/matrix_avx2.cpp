// matrix_avx2.cpp: matrix kernels for AVX2 + FMA + F16C, 8 rows at once.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/kernels.h"
#include "kernels/layout.h"

#define KT_HAS_BF16 0

namespace kt {
namespace {

struct V {
  using I = __m256i;
  using F = __m256;
  static constexpr int kRows = 8;
  static constexpr int kBytes = 32;
  static constexpr bool kDotU8 = false;
  static constexpr int kMaxM = 4;  // 16 registers
  // Not here: Q4_K 65 % of the peak against 72 from a stored tile (64 rows, one Zen 4 core).
  static constexpr bool kPasses = false;
  static constexpr int kMaxFloatM = 4;

  static I load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(uint8_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static I zero_i() { return _mm256_setzero_si256(); }
  static I set8(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
  static I set32(int x) { return _mm256_set1_epi32(x); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  static I or_masked(I a, I b, I mask) { return or_(a, and_(b, mask)); }
  template <int kN>
  static I srl16(I x) {
    return _mm256_srli_epi16(x, kN);
  }
  template <int kN>
  static I sll16(I x) {
    return _mm256_slli_epi16(x, kN);
  }
  template <int kN>
  static I sra32(I x) {
    return _mm256_srai_epi32(x, kN);
  }
  static I srl32(I x, int n) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(n)); }
  static I sll32(I x, int n) { return _mm256_slli_epi32(x, n); }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I sub8(I a, I b) { return _mm256_sub_epi8(a, b); }
  static I add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static I shuffle(I values, I index) { return _mm256_shuffle_epi8(values, index); }
  static I repeat128(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p)));
  }
  static I repeat32(const uint8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  static I dot_u8(I sum, I u8, I s8);  // named in a branch that is never taken
  // Sums of two products in 16 bits: u8 x s8, and s8 x s8 by moving the sign to the second factor.
  static I dot16_u8(I u8, I s8) { return _mm256_maddubs_epi16(u8, s8); }
  static I dot16_s8(I a, I b) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
  }
  static I pairs32(I x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

  // kRows rows of kRows words, stride bytes apart, become lines, 64 bytes apart: word i of row r is
  // word r of line i. flip is added to every word (exclusive or).
  static void transpose(const void* rows, int64_t stride, I flip, void* lines) {
    I a[8], b[8];
    const auto* from = static_cast<const uint8_t*>(rows);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      a[r] = xor_(load(from + r * stride), flip);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
      b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {  // lane l of a[r + i]: word 4 l + i of rows r .. r + 3
      a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    auto* to = static_cast<uint8_t*>(lines);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(to + 64 * i, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
      store(to + 64 * (i + 4), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
  }

  static F zero() { return _mm256_setzero_ps(); }
  static F set_f(float x) { return _mm256_set1_ps(x); }
  static F repeat_f(const uint8_t* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_ps(x);
  }
  static F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static void store_f(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static F as_float(I x) { return _mm256_castsi256_ps(x); }
  // 8 f16, u8, s8 or u16 values, one per row.
  static F halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I widen_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I widen_s8(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I widen_u16(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // 2^(e - 128); below e = 2 the subnormals 2^-128 and 2^-127.
  static F e8m0_half(I e) {
    const I normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const I tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    const I small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, tiny, small));
  }

  static float max_abs32(const float* x) {
    const F sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    F largest = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
    for (int i = 0; i < 32; i += 8) {
      const F v = _mm256_loadu_ps(x + i);
      unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      largest = _mm256_max_ps(_mm256_and_ps(v, sign), largest);
    }
    if (_mm256_movemask_ps(unordered) != 0) {
      return __builtin_nanf("");
    }
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    four = _mm_max_ss(four, _mm_movehdup_ps(four));
    return _mm_cvtss_f32(four);
  }
  static void quantize32(const float* x, float inverse, int8_t* q, int32_t* sums) {
    const F by = _mm256_set1_ps(inverse);
    for (int half = 0; half < 2; ++half) {
      // Out-of-range values (from NaN and infinity) must become 0, as the other ISAs make them.
      const I low_byte = _mm256_set1_epi32(255);
      I a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * half), by));
      I b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * half + 8), by));
      a = _mm256_and_si256(a, low_byte);
      b = _mm256_and_si256(b, low_byte);
      const I words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
      const __m128i bytes =
          _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * half), bytes);
      const I wide = _mm256_cvtepi8_epi16(bytes);
      const I pairs = _mm256_madd_epi16(wide, _mm256_set1_epi16(1));
      __m128i four =
          _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
      four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
      sums[half] = _mm_cvtsi128_si32(four);
    }
  }
};

#include "kernels/matrix_simd.inl"

constexpr MatrixKernels kKernels = {1, prepare, multiply_band, nullptr, peak};

}  // namespace

const MatrixKernels* matrix_kernels_avx2() { return &kKernels; }

}  // namespace kt
