// tiles_dequant.inl: quantised weights to bf16 tiles, for rows prepared as kActBf16 (prompt
// tokens). Included by matrix_amx.cpp, inside its anonymous namespace, after formats_simd.inl.
//
// A tile B of 32 columns x 16 output rows is 16 lines; a line holds two columns of each row, as
// neighbours. Which two is free as long as the activations agree: a nibble line's 32-bit word gives
// columns (0, 2) by one AND, (4, 6) by another, (1, 3) and (5, 7) after one shift. So the columns
// of every eight are taken in the order 0 2 4 6 1 3 5 7.
//
// Weights are formed in f16, 32 at a time, as one fused multiply-add of the stored integer: an f16
// with exponent 0 is its mantissa times 2^-24, so bits 4..9 need no conversion. Every output row
// gets a power of two 2^e of its own that brings its largest scale S to [2^14, 2^15); a weight w
// then becomes V = w * 2^(e - 20) or 2^(e - 24), at least 11 binary orders of magnitude above the
// smallest normal f16. Cutting three mantissa bits off (rounded) leaves the bits of the bf16
// V * 2^-112. The activations carry 2^28, and the row's factor puts the rest onto the sums: all of
// it powers of two, so that the only error is the rounding of weights and activations to bf16.

// The f16 instructions. Operands are words; the tests replace them on CPUs without AVX512-FP16.
#ifndef KT_HALF_OPERATIONS
inline __m512i half_fma(__m512i a, __m512i b, __m512i c) {
  return _mm512_castph_si512(
      _mm512_fmadd_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b), _mm512_castsi512_ph(c)));
}
inline __m512i half_mul(__m512i a, __m512i b) {
  return _mm512_castph_si512(_mm512_mul_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b)));
}
inline __m512i half_of_words(__m512i a) { return _mm512_castph_si512(_mm512_cvtepu16_ph(a)); }
inline __m512i half_of_signed(__m512i a) { return _mm512_castph_si512(_mm512_cvtepi16_ph(a)); }
#endif

// A function call per block would reload a dozen constants and costs a tenth.
#define KT_INLINE inline __attribute__((always_inline))

constexpr int kActExponent = 28;  // prepared activations are x * 2^28

inline __m512i words(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
inline __m512i and_words(__m512i a, int mask) { return _mm512_and_si512(a, words(mask)); }
// a | (b & mask)
inline __m512i or_words(__m512i a, __m512i b, int mask) { return V::or_masked(a, b, words(mask)); }

// f16 constant n * 2^-24.
inline __m512i tiny(int n) { return words(n < 0 ? 0x8000 | -n : n); }

// Each of 16 bytes, or 16 words, to both words of its row.
inline __m512i spread_bytes(const uint8_t* p) {
  const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_or_si512(row, _mm512_slli_epi32(row, 16));
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_maskz_permutexvar_epi8(0x5555555555555555u, index, _mm512_castsi128_si512(bytes));
}
inline __m512i spread_words(__m256i x) {
  const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_or_si512(row, _mm512_slli_epi32(row, 16));
  return _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(x));
}
inline __m256i load_words(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// The f16 weights of two columns to bf16 bits times 2^-112: (x + 4) >> 3 with the sign kept on top.
inline void store_line(uint8_t* line, __m512i half) {
  const __m512i bits = _mm512_mulhrs_epi16(half, words(4096));
  _mm512_store_si512(line, _mm512_and_si512(bits, words(0x8fff)));
}

// Largest magnitudes of f16 values; as integers, so that NaN is the largest of all.
inline __m256i larger(__m256i a, const uint8_t* halves) {
  const __m256i magnitude = _mm256_and_si256(load_words(halves), _mm256_set1_epi16(0x7fff));
  return _mm256_max_epu16(a, magnitude);
}

// What an output row's weights are multiplied by while they are f16: 2^e = p * q.
struct RowPowers {
  __m512i p, q;  // f16, in both words of a row
  __m512 e;
  __m512 wrong;  // NaN where the row's scales are not finite, else 0

  RowPowers() = default;
  // largest: bound of every scale of a row. most: largest e; up to 30, p and q are normal f16.
  RowPowers(__m512 largest, float most) {
    const __m512 wanted = _mm512_sub_ps(V::set_f(14.0f), _mm512_getexp_ps(largest));
    e = _mm512_max_ps(_mm512_min_ps(wanted, V::set_f(most)), V::set_f(-most));
    const __m512 half = _mm512_roundscale_ps(_mm512_mul_ps(e, V::set_f(0.5f)), 1);  // floor
    p = half_power(half);
    q = half_power(_mm512_sub_ps(e, half));
    wrong = _mm512_sub_ps(largest, largest);
  }
  static __m512i half_power(__m512 exponent) {
    return spread_words(_mm512_cvtps_ph(_mm512_scalef_ps(V::set_f(1.0f), exponent), 0));
  }
  // 16 f16 values times 2^e.
  __m512i scaled(const uint8_t* halves) const {
    return half_mul(half_mul(spread_words(load_words(halves)), p), q);
  }
  // The same times 2^(e - 20).
  __m512i scaled_min(const uint8_t* halves) const {
    const __m512i step = words(5 << 10);  // 2^-10
    const __m512i part = half_mul(spread_words(load_words(halves)), half_mul(p, step));
    return half_mul(part, half_mul(q, step));
  }
  // What the sums of a row are multiplied by: `exponent` undoes the rest of the weights' powers.
  __m512 factor(int exponent) const {
    const __m512 left = _mm512_sub_ps(V::set_f(static_cast<float>(exponent)), e);
    return _mm512_add_ps(_mm512_scalef_ps(V::set_f(1.0f), left), wrong);
  }
};

// How integers at bit 0 (converted first) and at bit 4 (taken as they are) become weights.
struct NibbleScale {
  __m512i low, high, add;
};

// Four lines of eight columns, from integers at bit 0 and at bit 4 of even and of odd columns.
KT_INLINE void store_nibbles(uint8_t* lines, const NibbleScale& s, __m512i even_low,
                             __m512i even_high, __m512i odd_low, __m512i odd_high) {
  store_line(lines, half_fma(half_of_words(even_low), s.low, s.add));
  store_line(lines + 64, half_fma(even_high, s.high, s.add));
  store_line(lines + 128, half_fma(half_of_words(odd_low), s.low, s.add));
  store_line(lines + 192, half_fma(odd_high, s.high, s.add));
}

// Four lines of eight columns, from bytes with offset 128.
KT_INLINE void store_bytes(uint8_t* lines, __m512i scale, __m512i add, __m512i first,
                           __m512i second) {
  store_line(lines, half_fma(and_words(first, 255), scale, add));
  store_line(lines + 64, half_fma(and_words(second, 255), scale, add));
  store_line(lines + 128, half_fma(_mm512_srli_epi16(first, 8), scale, add));
  store_line(lines + 192, half_fma(_mm512_srli_epi16(second, 8), scale, add));
}

// x shifted left, or right when kBy < 0.
template <int kBy>
inline __m512i shifted(__m512i x) {
  if constexpr (kBy > 0) {
    return _mm512_slli_epi16(x, kBy);
  } else if constexpr (kBy < 0) {
    return _mm512_srli_epi16(x, -kBy);
  } else {
    return x;
  }
}

// Line kJ of a block: nibbles alone, with one top bit (bit 2 kJ + (high) of `top`), or with two
// (bits 4 (kJ % 2) + 2 (high) of `top`).
template <int kBits, int kJ>
KT_INLINE void store_nibble_line(uint8_t* lines, const NibbleScale& s, const uint8_t* line,
                                 __m512i top) {
  const __m512i even = V::load(line);
  const __m512i odd = _mm512_srli_epi16(even, 8);
  __m512i even_low = and_words(even, 15), even_high = and_words(even, 240);
  __m512i odd_low = and_words(odd, 15), odd_high = and_words(odd, 240);
  if constexpr (kBits > 4) {
    constexpr int kMask = kBits == 5 ? 1 : 3;
    constexpr int kLow = kBits == 5 ? 2 * kJ : 4 * (kJ % 2);
    constexpr int kHigh = kLow + (kBits == 5 ? 1 : 2);
    even_low = or_words(even_low, shifted<4 - kLow>(top), kMask << 4);
    even_high = or_words(even_high, shifted<8 - kHigh>(top), kMask << 8);
    odd_low = or_words(odd_low, shifted<4 - kLow - 8>(top), kMask << 4);
    odd_high = or_words(odd_high, shifted<8 - kHigh - 8>(top), kMask << 8);
  }
  store_nibbles(lines, s, even_low, even_high, odd_low, odd_high);
}

// A decoder holds what 256 columns of a band need; block(b, lines, between) stores 16 lines of 32
// columns and calls between(0) .. between(3) after every fourth of them: tile instructions, which
// keep their own unit busy only when they come in small portions among the vector instructions.
//   kExponent    the lines are w * 2^(e - kExponent)
//   kMost        largest e
//   bound()      bound of the scales of each row of a whole band
//   kScales      where a full tile's scales for bound() begin, -1: not in the tiles; kScaleLines of
//                64 bytes

// Largest of the 16 f16 values at `offset` of every tile.
inline __m512 largest_of_tiles(const Matrix& w, const uint8_t* band, int64_t offset) {
  __m256i bound = _mm256_setzero_si256();
  for (int32_t tile = 0; tile < w.cols / kTileCols; ++tile) {
    bound = larger(bound, band + tile * tile_bytes(w.type) + offset);
  }
  return _mm512_cvtph_ps(bound);
}

// Largest of the f16 values of every block: array number `array` behind the weights of a tile.
inline __m512 largest_of_blocks(const Matrix& w, const uint8_t* band, int weight_bytes, int array) {
  __m256i bound = _mm256_setzero_si256();
  for (int32_t first = 0; first < w.cols; first += kTileCols, band += tile_bytes(w.type)) {
    const int nb = w.cols - first < kTileCols ? (w.cols - first) / 32 : 8;
    for (int b = 0; b < nb; ++b) {
      bound = larger(bound, band + nb * weight_bytes + 32 * (nb * array + b));
    }
  }
  return _mm512_cvtph_ps(bound);
}

// Mins must stay finite where they are large and the scales 0; up to 16 scales they cost nothing.
inline __m512 with_min(__m512 scale, __m512 min) {
  return V::add(scale, V::mul(min, V::set_f(0x1p-4f)));
}

// Q4_0, Q4_1, Q5_0, Q5_1: f16 scales (and mins) per 32 columns behind nibbles and top bits.
template <int32_t kTypeId, int kBits, int kOffset>
struct NibbleDecoder {
  static constexpr int32_t kType = kTypeId;
  static constexpr int kExponent = 132;
  static constexpr int kMost = 30;
  static constexpr int kBlockBytes = kBits == 5 ? 320 : 256;
  static constexpr bool kMin = kOffset == 0;
  static constexpr int kScales = 8 * kBlockBytes;
  static constexpr int kScaleLines = kMin ? 8 : 4;
  const uint8_t* tile;
  const uint8_t* top;
  const uint8_t* d;
  const uint8_t* m;
  const RowPowers& powers;

  static __m512 bound(const Matrix& w, const uint8_t* band) {
    const __m512 scale = largest_of_blocks(w, band, kBlockBytes, 0);
    return kMin ? with_min(scale, largest_of_blocks(w, band, kBlockBytes, 1)) : scale;
  }
  NibbleDecoder(const uint8_t* at, const uint8_t*, int nb, const RowPowers& rows)
      : tile(at), top(at + nb * 256), d(at + nb * kBlockBytes), m(d + nb * 32), powers(rows) {}
  template <class Between>
  KT_INLINE void block(int b, uint8_t* lines, const Between& between) const {
    NibbleScale s;
    s.high = powers.scaled(d + 32 * b);
    s.low = half_mul(s.high, tiny(16));
    s.add = kMin ? powers.scaled_min(m + 32 * b) : half_mul(s.high, tiny(-16 * kOffset));
    const __m512i bits = kBits == 5 ? V::load(top + 64 * b) : V::zero_i();
    const uint8_t* line = tile + 256 * b;
    store_nibble_line<kBits, 0>(lines, s, line, bits);
    between(0);
    store_nibble_line<kBits, 1>(lines + 256, s, line + 64, bits);
    between(1);
    store_nibble_line<kBits, 2>(lines + 512, s, line + 128, bits);
    between(2);
    store_nibble_line<kBits, 3>(lines + 768, s, line + 192, bits);
    between(3);
  }
};

// Q4_K, Q5_K: f16 d and dmin of 256 columns, 6-bit scales and mins of 32.
template <int32_t kTypeId, int kBits>
struct SuperDecoder {
  static constexpr int32_t kType = kTypeId;
  static constexpr int kExponent = 132;
  static constexpr int kMost = 30;
  static constexpr int kPlanes = kBits == 5 ? 2560 : 2048;
  static constexpr int kScales = kPlanes + 192;
  static constexpr int kScaleLines = 1;
  const uint8_t* tile;
  KScales scales;
  __m512i d, dmin;

  static __m512 bound(const Matrix& w, const uint8_t* band) {
    const __m512 d = V::mul(largest_of_tiles(w, band, kPlanes + 192), V::set_f(63.0f));
    return with_min(d, largest_of_tiles(w, band, kPlanes + 224));
  }
  SuperDecoder(const uint8_t* at, const uint8_t*, int, const RowPowers& rows)
      : tile(at), scales(at + kPlanes, 0) {
    d = rows.scaled(at + kPlanes + 192);
    dmin = _mm512_xor_si512(rows.scaled_min(at + kPlanes + 224), words(0x8000));
  }
  template <class Between>
  KT_INLINE void block(int b, uint8_t* lines, const Between& between) const {
    NibbleScale s;
    s.high = half_mul(half_of_words(spread_bytes(scales.value[b])), d);
    s.low = half_mul(s.high, tiny(16));
    s.add = half_mul(half_of_words(spread_bytes(scales.value[8 + b])), dmin);
    const __m512i bits = kBits == 5 ? V::load(tile + 2048 + 64 * b) : V::zero_i();
    const uint8_t* line = tile + 256 * b;
    store_nibble_line<kBits, 0>(lines, s, line, bits);
    between(0);
    store_nibble_line<kBits, 1>(lines + 256, s, line + 64, bits);
    between(1);
    store_nibble_line<kBits, 2>(lines + 512, s, line + 128, bits);
    between(2);
    store_nibble_line<kBits, 3>(lines + 768, s, line + 192, bits);
    between(3);
  }
};

// Q6_K: f16 d of 256 columns before the tiles, int8 scales of 16 columns.
struct SixDecoder {
  static constexpr int32_t kType = kQ6_K;
  static constexpr int kExponent = 132;
  static constexpr int kMost = 30;
  static constexpr int kScales = -1, kScaleLines = 0;
  const uint8_t* tile;
  __m512i d;

  static __m512 bound(const Matrix& w, const uint8_t* band) {
    __m256i largest = _mm256_setzero_si256();
    for (int32_t t = 0; t < w.cols / kTileCols; ++t) {
      largest = larger(largest, band + 32 * t);
    }
    return V::mul(_mm512_cvtph_ps(largest), V::set_f(128.0f));
  }
  SixDecoder(const uint8_t* at, const uint8_t* halves, int, const RowPowers& rows)
      : tile(at), d(rows.scaled(halves)) {}
  NibbleScale scale(int group) const {
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 3072 + 16 * group));
    NibbleScale s;
    s.high = half_mul(half_of_signed(spread_words(_mm256_cvtepi8_epi16(bytes))), d);
    s.low = half_mul(s.high, tiny(16));
    s.add = half_mul(s.high, tiny(-16 * 32));
    return s;
  }
  template <class Between>
  KT_INLINE void block(int b, uint8_t* lines, const Between& between) const {
    const uint8_t* line = tile + 256 * b;
    const uint8_t* top = tile + 2048 + 128 * b;
    NibbleScale s = scale(2 * b);
    __m512i bits = V::load(top);
    store_nibble_line<6, 0>(lines, s, line, bits);
    between(0);
    store_nibble_line<6, 1>(lines + 256, s, line + 64, bits);
    between(1);
    s = scale(2 * b + 1);
    bits = V::load(top + 64);
    store_nibble_line<6, 0>(lines + 512, s, line + 128, bits);
    between(2);
    store_nibble_line<6, 1>(lines + 768, s, line + 192, bits);
    between(3);
  }
};

// Types whose weights are bytes, or nibbles that a table turns into bytes.
struct ByteScale {
  __m512i scale, add;
  explicit ByteScale(__m512i s) : scale(s), add(half_mul(s, tiny(-128))) {}
};

struct EightDecoder {
  static constexpr int32_t kType = kQ8_0;
  static constexpr int kExponent = 136;
  static constexpr int kMost = 30;
  static constexpr int kScales = 4096, kScaleLines = 4;
  const uint8_t* tile;
  const uint8_t* d;
  const RowPowers& powers;

  static __m512 bound(const Matrix& w, const uint8_t* band) {
    return largest_of_blocks(w, band, 512, 0);
  }
  EightDecoder(const uint8_t* at, const uint8_t*, int nb, const RowPowers& rows)
      : tile(at), d(at + nb * 512), powers(rows) {}
  template <class Between>
  KT_INLINE void block(int b, uint8_t* lines, const Between& between) const {
    const ByteScale s(powers.scaled(d + 32 * b));
    const __m512i flip = V::set8(-128);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const uint8_t* line = tile + 512 * b + 128 * j;
      store_bytes(lines + 256 * j, s.scale, s.add, V::xor_(V::load(line), flip),
                  V::xor_(V::load(line + 64), flip));
      between(j);
    }
  }
};

template <class Between>
KT_INLINE void store_table_block(const uint8_t* line, __m512i values, const ByteScale& s,
                                 uint8_t* lines, const Between& between) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    V::I low, high;
    split_nibbles(line + 64 * j, &low, &high);
    store_bytes(lines + 256 * j, s.scale, s.add, V::shuffle(values, low), V::shuffle(values, high));
    between(j);
  }
}

struct NonlinearDecoder {
  static constexpr int32_t kType = kIQ4_NL;
  static constexpr int kExponent = 136;
  static constexpr int kMost = 30;
  static constexpr int kScales = 2048, kScaleLines = 4;
  const uint8_t* tile;
  const uint8_t* d;
  const RowPowers& powers;
  __m512i values;

  static __m512 bound(const Matrix& w, const uint8_t* band) {
    return largest_of_blocks(w, band, 256, 0);
  }
  NonlinearDecoder(const uint8_t* at, const uint8_t*, int nb, const RowPowers& rows)
      : tile(at), d(at + nb * 256), powers(rows), values(table(kIq4Values, 128)) {}
  template <class Between>
  KT_INLINE void block(int b, uint8_t* lines, const Between& between) const {
    store_table_block(tile + 256 * b, values, ByteScale(powers.scaled(d + 32 * b)), lines, between);
  }
};

// IQ4_XS: f16 d of 256 columns, 6-bit scales minus 32 of 32.
struct NonlinearSuperDecoder {
  static constexpr int32_t kType = kIQ4_XS;
  static constexpr int kExponent = 136;
  static constexpr int kMost = 30;
  static constexpr int kScales = 2112, kScaleLines = 1;
  const uint8_t* tile;
  __m512i d, values;

  static __m512 bound(const Matrix& w, const uint8_t* band) {
    return V::mul(largest_of_tiles(w, band, 2112), V::set_f(32.0f));
  }
  NonlinearSuperDecoder(const uint8_t* at, const uint8_t*, int, const RowPowers& rows)
      : tile(at), d(rows.scaled(at + 2112)), values(table(kIq4Values, 128)) {}
  template <class Between>
  KT_INLINE void block(int b, uint8_t* lines, const Between& between) const {
    const V::I low = V::srl32(V::widen_u8(tile + 2048 + b / 2 * 16), 4 * (b & 1));
    const V::I high = V::sll32(V::and_(V::srl32(V::widen_u16(tile + 2144), 2 * b), V::set32(3)), 4);
    const V::I scale = V::sub32(V::or_(V::and_(low, V::set32(15)), high), V::set32(32));
    const __m512i integer = spread_words(_mm512_cvtepi32_epi16(scale));
    store_table_block(tile + 256 * b, values, ByteScale(half_mul(half_of_signed(integer), d)),
                      lines, between);
  }
};

// MXFP4: e8m0 scales of 32 columns. The table's values are eight times too large, so that they fill
// a byte.
struct MxDecoder {
  static constexpr int32_t kType = kMXFP4;
  static constexpr int kExponent = 133;
  static constexpr int kMost = 120;  // the scales are multiplied as f32
  static constexpr int kScales = 2048, kScaleLines = 2;
  const uint8_t* tile;
  const uint8_t* exponents;
  const RowPowers& powers;
  __m512i values;

  static __m512 bound(const Matrix& w, const uint8_t* band) {
    __m128i largest = _mm_setzero_si128();
    for (int32_t first = 0; first < w.cols; first += kTileCols, band += tile_bytes(kMXFP4)) {
      const int32_t left = w.cols - first;
      const int nb = left < kTileCols ? left / 32 : 8;
      for (int b = 0; b < nb; ++b) {
        largest = _mm_max_epu8(
            largest, _mm_loadu_si128(reinterpret_cast<const __m128i*>(band + nb * 256 + b * 16)));
      }
    }
    return V::e8m0_half(_mm512_cvtepu8_epi32(largest));
  }
  MxDecoder(const uint8_t* at, const uint8_t*, int nb, const RowPowers& rows)
      : tile(at), exponents(at + nb * 256), powers(rows) {
    alignas(16) int8_t bytes[16];
    for (int i = 0; i < 16; ++i) {
      bytes[i] = static_cast<int8_t>(8 * kMxfp4Values[i] + 128);
    }
    values = V::repeat128(bytes);
  }
  template <class Between>
  KT_INLINE void block(int b, uint8_t* lines, const Between& between) const {
    const __m512 scale = V::e8m0_half(V::widen_u8(exponents + 16 * b));
    const __m512 power = _mm512_scalef_ps(V::set_f(1.0f), powers.e);
    const __m512i half = spread_words(_mm512_cvtps_ph(V::mul(scale, power), 0));
    store_table_block(tile + 256 * b, values, ByteScale(half), lines, between);
  }
};
