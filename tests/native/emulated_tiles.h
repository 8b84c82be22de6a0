// emulated_tiles.h: AMX tile instructions as plain C++, so that matrix_amx.cpp can be tested on
// CPUs without AMX. Included before it (-include); replaces the intrinsics' macros. One thread
// only.
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

static Config config;
static uint8_t tiles[8][16][64];

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

// c[m][n] += sum over k of four signed products.
inline void dot_s8(int c, int a, int b) {
  for (int m = 0; m < config.rows[a]; ++m) {
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tiles[c][m][4 * n], 4);
      for (int i = 0; i < config.row_bytes[a]; ++i) {
        sum += static_cast<int8_t>(tiles[a][m][i]) *
               static_cast<int8_t>(tiles[b][i / 4][4 * n + i % 4]);
      }
      std::memcpy(&tiles[c][m][4 * n], &sum, 4);
    }
  }
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

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_release() ((void)0)
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, 1024)
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_dpbssd(c, a, b) emulated::dot_s8(c, a, b)
#define _tile_dpbf16ps(c, a, b) emulated::dot_bf16(c, a, b)
