// emulated_tiles.h: AMX tile and AVX512-FP16 instructions in terms of others, so that
// matrix_amx.cpp can be tested on CPUs without them. Included before it (-include); replaces the
// intrinsics' macros and the kernels' f16 operations. One thread only.
#pragma once

#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

static thread_local Config config;
static thread_local uint8_t tiles[8][16][64];

inline void load_config(const void* from) {
  std::memcpy(&config, from, sizeof(config));
  std::memset(tiles, 0, sizeof(tiles));
}

inline void load(int tile, const void* base, size_t stride) {
  std::memset(tiles[tile], 0, sizeof(tiles[tile]));
  for (int row = 0; row < config.rows[tile]; ++row) {
    std::memcpy(tiles[tile][row], static_cast<const uint8_t*>(base) + row * stride,
                config.row_bytes[tile]);
  }
}

inline void store(int tile, void* base, size_t stride) {
  for (int row = 0; row < config.rows[tile]; ++row) {
    std::memcpy(static_cast<uint8_t*>(base) + row * stride, tiles[tile][row],
                config.row_bytes[tile]);
  }
}

inline float bf16(const uint8_t* p) {
  const uint32_t bits = static_cast<uint32_t>(p[0] | p[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// c[m][n] += (sum of even products) + (sum of odd products), each by fused multiply-adds.
inline void dot_bf16(int c, int a, int b) {
  for (int m = 0; m < config.rows[a]; ++m) {
    for (int n = 0; n < 16; ++n) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int k = 0; k < config.row_bytes[a] / 4; ++k) {
        even = fmaf(bf16(&tiles[a][m][4 * k]), bf16(&tiles[b][k][4 * n]), even);
        odd = fmaf(bf16(&tiles[a][m][4 * k + 2]), bf16(&tiles[b][k][4 * n + 2]), odd);
      }
      std::memcpy(&sum, &tiles[c][m][4 * n], 4);
      sum += even + odd;
      std::memcpy(&tiles[c][m][4 * n], &sum, 4);
    }
  }
}

// f16 operations on 32 words by way of f32, where every f16 is exact. The sums of half_fma are
// rounded twice, which differs from the instruction in one of some thousand results, by one unit.
template <class Body>
inline __m512i in_f32(Body body) {
  const __m256i low = _mm512_cvtps_ph(body(0), 0), high = _mm512_cvtps_ph(body(1), 0);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline __m256i part(__m512i x, int which) {
  return which == 0 ? _mm512_castsi512_si256(x) : _mm512_extracti64x4_epi64(x, 1);
}
inline __m512 f32(__m512i x, int which) { return _mm512_cvtph_ps(part(x, which)); }

}  // namespace emulated

#define KT_HALF_OPERATIONS
static inline __m512i half_fma(__m512i a, __m512i b, __m512i c) {
  using emulated::f32;
  return emulated::in_f32([&](int i) { return _mm512_fmadd_ps(f32(a, i), f32(b, i), f32(c, i)); });
}
static inline __m512i half_mul(__m512i a, __m512i b) {
  return emulated::in_f32(
      [&](int i) { return _mm512_mul_ps(emulated::f32(a, i), emulated::f32(b, i)); });
}
static inline __m512i half_of_words(__m512i a) {
  return emulated::in_f32(
      [&](int i) { return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(emulated::part(a, i))); });
}
static inline __m512i half_of_signed(__m512i a) {
  return emulated::in_f32(
      [&](int i) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(emulated::part(a, i))); });
}

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_release() ((void)0)
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, 1024)
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) emulated::dot_bf16(c, a, b)
