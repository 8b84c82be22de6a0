// layout.h: where things lie inside packed bands and prepared activations.
//
// Included by every ISA file: only constants and functions of internal linkage.
//
// R16 band = 16 output rows x all columns, cut into tiles of 256 columns (the last one may have
// fewer for types with 32-blocks; nb = its 32-blocks). "Line" = 64 bytes = 16 rows x one 32-bit
// word, row r at byte 4 r. Offsets inside a tile, in order:
//   bytes    Q8_0                   line g (k = 4g..4g+3), then f16 d[nb][16]
//   nibbles  Q4_0 IQ4_NL            line j: low nibbles k = 8j..8j+3, high nibbles 8j+4..8j+7;
//                                   then d[nb][16]
//            Q4_1                   nibbles, d[nb][16], m[nb][16]
//            MXFP4                  nibbles, e8m0 e[nb][16]
//            Q5_0 / Q5_1            nibbles, one line of top bits per 32-block (bit p of byte t =
//                                   k 4p + t), d[nb][16], m[nb][16]
//            Q4_K                   nibbles, scales [12][16], f16 d[16], dmin[16]
//            Q5_K                   nibbles, 8 lines of top bits, scales [12][16], d[16], dmin[16]
//            IQ4_XS                 nibbles, scales_l [4][16], d[16], scales_h u16 [16]
//            Q2_K                   16 lines of pairs (bits 2p of byte t in line j = k 16j + 4p +
//            t),
//                                   scales and mins [16][16], d[16], dmin[16]
//            Q3_K                   16 lines of pairs, 8 lines of top bits, scales [12][16]; the d
//            as
//                                   those of Q6_K
//   Q6_K                            nibbles, 16 lines of top pairs, int8 scales [16][16]; the
//                                   f16 d of all tiles lie before the first tile (they would
//                                   misalign every second)
//   F32  line k;   F16  half line k (32 bytes);   BF16  line of pairs (k = 2j low, 2j + 1 high)
// Every other type keeps its GGUF blocks: those of the 16 rows side by side, tile after tile.
// Every tile size equals the bytes of its GGUF blocks; only the end of a band is padded to 64.
#pragma once

#include <cstdint>

#include "kernels/blocks.h"

namespace kt {
namespace {

constexpr int kTileCols = 256;

// A prepared kActQ8 row of nb = ceil(cols / 32) blocks, as arrays one after another:
//   int8 q[32 nb]; f32 scale[nb]; f32 sum[nb]; int32 off128[nb]; int32 off32[2 nb]; f32 sum16[2 nb]
// with x ~ scale * q, q = round(x * 127 / max|x|) in [-127, 127], sum = scale * (sum of q) of 32
// columns, sum16 the same of 16 columns, off128 = -128 * (sum of q) and off32 = -32 * (sum of q of
// 16 columns): start values of integer sums over weights stored with that offset.
struct ActLayout {
  int64_t scale, sum, off128, off32, sum16, end;
};
[[maybe_unused]] constexpr ActLayout act_layout(int64_t cols) {
  const int64_t nb = (cols + 31) / 32;
  return {32 * nb, 36 * nb, 40 * nb, 44 * nb, 52 * nb, 60 * nb};
}

[[maybe_unused]] constexpr int64_t align_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// The smallest odd number of 64-byte lines that holds `bytes`: rows this far apart fall into
// different sets of a cache, whatever the number of columns is.
[[maybe_unused]] constexpr int64_t odd_lines(int64_t bytes) {
  return (align_up(bytes, 64) / 64 | 1) * 64;
}

// A prepared kActF32 row: the f32 values padded with zeros to 64 bytes, then room for two bf16
// planes (high and low part, each padded to 32 columns) that only the AMX kernels fill and read.
[[maybe_unused]] constexpr int64_t float_row_bytes(int64_t cols) { return align_up(4 * cols, 64); }
[[maybe_unused]] constexpr int64_t bf16_plane_bytes(int64_t cols) { return odd_lines(2 * cols); }

// Bytes of a full 256-column tile of an R16 type; 0 for types with another layout.
[[maybe_unused]] constexpr int64_t tile_bytes(int32_t type) {
  switch (type) {
    case kQ2_K:
      return 1344;
    case kQ3_K:
      return 1728;
    case kQ4_0:
    case kIQ4_NL:
    case kQ4_K:
      return 2304;
    case kQ4_1:
      return 2560;
    case kQ5_0:
    case kQ5_K:
      return 2816;
    case kQ5_1:
      return 3072;
    case kQ6_K:
      return 3328;
    case kQ8_0:
      return 4352;
    case kIQ4_XS:
    case kMXFP4:
      return 2176;
    default:
      return 0;
  }
}

// Bytes before the first tile of a band.
[[maybe_unused]] constexpr int64_t band_header(int32_t type, int64_t cols) {
  return type == kQ6_K || type == kQ3_K ? align_up(cols / kTileCols * 32, 64) : 0;
}

}  // namespace
}  // namespace kt
