// simd_512.inl: leaf operations on 512-bit registers, 16 rows at once. Included inside the
// anonymous namespace of an ISA file, which defines KT_HAS_VNNI as 0 or 1.
struct V {
  using I = __m512i;
  using F = __m512;
  static constexpr int kRows = 16;
  static constexpr int kBytes = 64;
  static constexpr bool kDotU8 = KT_HAS_VNNI != 0;
  static constexpr int kMaxM = 8;
  // More than kMaxM rows: decoding the weights anew for each group of rows beats storing them in
  // between. Share of the peak, 16 rows, one Zen 4 core: Q4_K 69 % against 60, Q6_K 63 against 60,
  // Q8_0 78 against 67; 64 rows: 69 and 65, 64 and 66, 78 and 73.
  static constexpr bool kPasses = true;
  static constexpr int kMaxFloatM = 8;

  static I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I load_i(const int32_t* p) { return _mm512_load_si512(p); }
  static void store(uint8_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I zero_i() { return _mm512_setzero_si512(); }
  static I set8(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
  static I set32(int x) { return _mm512_set1_epi32(x); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
  // a | (b & mask)
  static I or_masked(I a, I b, I mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }
  template <int kN>
  static I srl16(I x) {
    return _mm512_srli_epi16(x, kN);
  }
  template <int kN>
  static I sll16(I x) {
    return _mm512_slli_epi16(x, kN);
  }
  template <int kN>
  static I sra32(I x) {
    return _mm512_srai_epi32(x, kN);
  }
  static I srl32(I x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
  static I sll32(I x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I sub8(I a, I b) { return _mm512_sub_epi8(a, b); }
  static I add16(I a, I b) { return _mm512_add_epi16(a, b); }
  static I shuffle(I values, I index) { return _mm512_shuffle_epi8(values, index); }
  static I repeat128(const void* p) {
    return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(p)));
  }
  static I repeat32(const uint8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
#if KT_HAS_VNNI
  static I dot_u8(I sum, I u8, I s8) { return _mm512_dpbusd_epi32(sum, u8, s8); }
#else
  static I dot_u8(I sum, I u8, I s8);  // named in a branch that is never taken
#endif
  // Sums of two products in 16 bits: u8 x s8, and s8 x s8 by moving the sign to the second factor.
  static I dot16_u8(I u8, I s8) { return _mm512_maddubs_epi16(u8, s8); }
  static I dot16_s8(I a, I b) {
    const I moved = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
    return _mm512_maddubs_epi16(_mm512_abs_epi8(a), moved);
  }
  static I pairs32(I x) { return _mm512_madd_epi16(x, _mm512_set1_epi16(1)); }

  // kRows rows of kRows words, stride bytes apart, become lines, 64 bytes apart: word i of row r is
  // word r of line i. flip is added to every word (exclusive or).
  static void transpose(const void* rows, int64_t stride, I flip, void* lines) {
    I a[16], b[16];
    const auto* from = static_cast<const uint8_t*>(rows);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      a[r] = xor_(load(from + r * stride), flip);
    }
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
      b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {  // lane l of a[r + i]: word 4 l + i of rows r .. r + 3
      a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);      // words i, i + 8
      b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);  // words i + 4, i + 12
      b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    auto* to = static_cast<uint8_t*>(lines);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      store(to + 64 * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
      store(to + 64 * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
  }

  static F zero() { return _mm512_setzero_ps(); }
  static F set_f(float x) { return _mm512_set1_ps(x); }
  static F repeat_f(const uint8_t* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_ps(x);
  }
  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static void store_f(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static F as_float(I x) { return _mm512_castsi512_ps(x); }
  // 16 f16, u8, s8 or u16 values, one per row.
  static F halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I widen_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I widen_s8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I widen_u16(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // 2^(e - 128); below e = 2 the subnormals 2^-128 and 2^-127.
  static F e8m0_half(I e) {
    const I normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const I tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    const __mmask16 small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, small, tiny));
  }

  static float max_abs32(const float* x) {
    const F a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    if (_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0) {
      return __builtin_nanf("");
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  }
  static void quantize32(const float* x, float inverse, int8_t* q, int32_t* sums) {
    const F by = _mm512_set1_ps(inverse);
    for (int half = 0; half < 2; ++half) {
      const I wide = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * half), by));
      const __m128i bytes = _mm512_cvtepi32_epi8(wide);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * half), bytes);
      // NaN and infinity give bytes of 0 here; their block's scale carries them.
      sums[half] = _mm512_reduce_add_epi32(_mm512_cvtepi8_epi32(bytes));
    }
  }
};
