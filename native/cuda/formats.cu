// formats.cu: how a warp reads R16 bands (native/src/kernels/layout.h) in the shape that integer
// matrix instructions want.
//
// A unit is 128 columns, four 32-column blocks, of a band of 16 rows. Lane 4 g + t reads rows 2 g
// and 2 g + 1, columns 8 t .. 8 t + 7 of every block: eight bytes of one 64-byte line, so that a
// warp's load covers four whole lines. These are multiply_tile's left operand with rows g and g + 8
// standing for 2 g and 2 g + 1 and a permuted order of columns, the same for the right operand.
// Scales are read once per block: lane t of a group reads those of the unit's block t.

constexpr int kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13,
              kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kMXFP4 = 39;
constexpr int kUnitBlocks = 4;

// As filled by the host (engine/cuda/args.py).
struct Matrix {
  const u8* data;
  i64 band_bytes;
  i64 expert_bytes;
  int type, rows, cols, num_bands;
};

template <int kType>
constexpr int tile_bytes() {
  return kType == kQ4_0 || kType == kIQ4_NL || kType == kQ4_K ? 2304
         : kType == kQ4_1                                     ? 2560
         : kType == kQ5_0 || kType == kQ5_K                   ? 2816
         : kType == kQ5_1                                     ? 3072
         : kType == kQ6_K                                     ? 3328
         : kType == kQ8_0                                     ? 4352
                                                              : 2176;
}
// Types of 256 columns have no shorter last tile.
template <int kType>
constexpr bool has_whole_tiles() {
  return kType == kQ4_K || kType == kQ5_K || kType == kQ6_K || kType == kIQ4_XS;
}
template <int kType>
constexpr bool has_fifth_bit() {
  return kType == kQ5_0 || kType == kQ5_1 || kType == kQ5_K;
}
// weight = s q - m; the others have m = 0.
template <int kType>
constexpr bool has_min() {
  return kType != kQ8_0 && kType != kQ6_K && kType != kIQ4_NL && kType != kIQ4_XS &&
         kType != kMXFP4;
}

// What a lane loads of a unit; unused members cost nothing.
template <int kType>
struct Unit {
  uint2 q[kType == kQ8_0 ? 2 * kUnitBlocks : kUnitBlocks];
  uint2 top[kUnitBlocks];
  u32 s[5];
};

// Bytes of a tile of nb blocks in a warp's shared memory; Q6_K's d follow there.
template <int kType>
__device__ __forceinline__ int stage_bytes(int nb) {
  return has_whole_tiles<kType>() ? tile_bytes<kType>() : tile_bytes<kType>() / 8 * nb;
}
template <int kType>
__device__ __forceinline__ const u8* tile_at(const u8* band, int cols, int tile) {
  const int header = kType == kQ6_K ? (cols / 256 * 32 + 63) / 64 * 64 : 0;
  return band + header + tile * tile_bytes<kType>();
}
template <int kType>
__device__ __forceinline__ int blocks_of_tile(int cols, int tile) {
  return has_whole_tiles<kType>() ? 8 : min(8, cols / 32 - tile * 8);
}

// In shared memory the lines of a tile's nb * 256 bytes of low bits (Q8_0: nb * 512) change places
// so that the lines that lanes t = 0 .. 3 read at once lie in different banks: this is added to the
// address, bit by bit.
template <int kType>
__device__ __forceinline__ int swizzle(int at) {
  return kType == kQ8_0 ? (at >> 2) & 96 : (at >> 2) & 32;
}

// A warp starts to copy a tile.
template <int kType>
__device__ __forceinline__ void copy_tile(u8* stage, const u8* band, int cols, int tile) {
  const int lane = threadIdx.x & 31, nb = blocks_of_tile<kType>(cols, tile);
  const u8* from = tile_at<kType>(band, cols, tile) + 16 * lane;
  const int bytes = stage_bytes<kType>(nb), low_bytes = nb * (kType == kQ8_0 ? 512 : 256);
  const int to = 16 * lane, swizzled = to ^ swizzle<kType>(to);  // 512 bytes on it is the same
#pragma unroll
  for (int at = 0; at < tile_bytes<kType>(); at += 512) {
    if (at + 16 * lane < bytes) {
      const bool is_low = has_whole_tiles<kType>() ? at < 2048 : at + to < low_bytes;
      copy_16(stage + at + (is_low ? swizzled : to), from + at);
    }
  }
  if (kType == kQ6_K && lane < 2) {
    copy_16(stage + to + tile_bytes<kType>(), band + tile * 32 + 16 * lane);
  }
}

__device__ __forceinline__ u32 u16_at(const u8* p) { return *reinterpret_cast<const u16*>(p); }
__device__ __forceinline__ u32 u32_at(const u8* p) { return *reinterpret_cast<const u32*>(p); }
__device__ __forceinline__ uint2 pair_at(const u8* p) { return *reinterpret_cast<const uint2*>(p); }

// Scale bytes of block s of a tile of nb blocks, rows 2 g and 2 g + 1; d: where Q6_K has them.
template <int kType>
__device__ __forceinline__ void load_scales(const u8* tile, const u8* d, int nb, int s, int g,
                                            Unit<kType>& out) {
  const int t = s & 3;
  if constexpr (kType == kQ4_K || kType == kQ5_K) {
    const u8* planes = tile + (kType == kQ4_K ? 2048 : 2560);
    out.s[0] = u16_at(planes + t * 16 + 2 * g);
    out.s[1] = u16_at(planes + (t + 4) * 16 + 2 * g);
    out.s[2] = u16_at(planes + (t + 8) * 16 + 2 * g);
    out.s[3] = u32_at(planes + 192 + 4 * g);
    out.s[4] = u32_at(planes + 224 + 4 * g);
  } else if constexpr (kType == kQ6_K) {
    out.s[0] = u16_at(tile + 3072 + 2 * s * 16 + 2 * g);
    out.s[1] = u16_at(tile + 3072 + (2 * s + 1) * 16 + 2 * g);
    out.s[3] = u32_at(d + 4 * g);
  } else if constexpr (kType == kIQ4_XS) {
    out.s[0] = u16_at(tile + 2048 + (s >> 1) * 16 + 2 * g);
    out.s[1] = u32_at(tile + 2144 + 4 * g);
    out.s[3] = u32_at(tile + 2112 + 4 * g);
  } else if constexpr (kType == kMXFP4) {
    out.s[0] = u16_at(tile + nb * 256 + s * 16 + 2 * g);
  } else {
    constexpr int kBefore = kType == kQ8_0 ? 512 : has_fifth_bit<kType>() ? 320 : 256;
    out.s[3] = u32_at(tile + nb * kBefore + s * 32 + 4 * g);
    if constexpr (kType == kQ4_1 || kType == kQ5_1) {
      out.s[4] = u32_at(tile + nb * (kBefore + 32) + s * 32 + 4 * g);
    }
  }
}

// Half 0 or 1 of a tile of nb blocks. kStaged: in shared memory, as copy_tile leaves it.
template <int kType, bool kStaged>
__device__ __forceinline__ void load_unit(const u8* tile, const u8* d, int nb, int half,
                                          Unit<kType>& out) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kUnitBlocks; ++j) {
    const int s = half * kUnitBlocks + j;
    const bool is_there = has_whole_tiles<kType>() || s < nb;
    const uint2 zero = make_uint2(0, 0);
    if constexpr (kType == kQ8_0) {
      const int line = 2 * t * 64 + g * 8, next = line + 64,
                turn = kStaged ? swizzle<kType>(line) : 0;
      out.q[2 * j] = is_there ? pair_at(tile + s * 512 + (line ^ turn)) : zero;
      out.q[2 * j + 1] = is_there ? pair_at(tile + s * 512 + (next ^ turn)) : zero;
    } else {
      const int line = t * 64 + g * 8;
      const u8* from = tile + s * 256 + (line ^ (kStaged ? swizzle<kType>(line) : 0));
      out.q[j] = is_there ? pair_at(from) : zero;
    }
    if constexpr (has_fifth_bit<kType>()) {
      out.top[j] = is_there ? pair_at(tile + nb * 256 + s * 64 + g * 8) : zero;
    } else if constexpr (kType == kQ6_K) {
      out.top[j] = pair_at(tile + 2048 + (2 * s + (t >> 1)) * 64 + g * 8);
    }
  }
  // A block beyond the end repeats the last one's scales, which scales_of() clears.
  load_scales<kType>(tile, d, nb, min(half * kUnitBlocks + t, nb - 1), g, out);
}

// q holds four table indices 0..15 as bytes.
__device__ __forceinline__ u32 look_up(u32 q, const u32 (&table)[4]) {
  const u32 pairs = q | (q >> 4);
  const u32 select = (pairs & 0xff) | ((pairs >> 8) & 0xff00);
  const u32 low = __byte_perm(table[0], table[1], select & 0x7777);
  const u32 high = __byte_perm(table[2], table[3], select & 0x7777);
  const u32 mask = ((q >> 3) & 0x01010101) * 0xff;
  return (low & ~mask) | (high & mask);
}

// Block j of a unit as multiply_tile's left operand: row 2 g in a[0] (columns 8 t .. 8 t + 3) and
// a[2] (8 t + 4 .. 8 t + 7), row 2 g + 1 in a[1] and a[3].
template <int kType>
__device__ __forceinline__ void decode_block(const Unit<kType>& unit, int j, int t, u32 (&a)[4]) {
  if constexpr (kType == kQ8_0) {
    a[0] = unit.q[2 * j].x;
    a[1] = unit.q[2 * j].y;
    a[2] = unit.q[2 * j + 1].x;
    a[3] = unit.q[2 * j + 1].y;
    return;
  } else if constexpr (kType == kQ6_K) {
    // 4 (q - 32): the six bits at the top of a byte, the first of them flipped.
    constexpr u32 kLow = 0x3c3c3c3c, kTop = 0xc0c0c0c0, kFlip = 0x80808080;
    const u32 x = unit.top[j].x, y = unit.top[j].y;
    const int to_top = 6 - 4 * (t & 1);
    a[0] = ((unit.q[j].x << 2 & kLow) ^ kFlip) ^ (x << to_top & kTop);
    a[1] = ((unit.q[j].y << 2 & kLow) ^ kFlip) ^ (y << to_top & kTop);
    a[2] = ((unit.q[j].x >> 2 & kLow) ^ kFlip) ^ (x << (to_top - 2) & kTop);
    a[3] = ((unit.q[j].y >> 2 & kLow) ^ kFlip) ^ (y << (to_top - 2) & kTop);
    return;
  } else {
    a[0] = unit.q[j].x & 0x0f0f0f0f;
    a[1] = unit.q[j].y & 0x0f0f0f0f;
    a[2] = (unit.q[j].x >> 4) & 0x0f0f0f0f;
    a[3] = (unit.q[j].y >> 4) & 0x0f0f0f0f;
  }
  if constexpr (has_fifth_bit<kType>()) {
    const u32 x = unit.top[j].x >> (2 * t), y = unit.top[j].y >> (2 * t);
    a[0] |= (x << 4) & 0x10101010;
    a[1] |= (y << 4) & 0x10101010;
    a[2] |= (x << 3) & 0x10101010;
    a[3] |= (y << 3) & 0x10101010;
  } else if constexpr (kType == kIQ4_NL || kType == kIQ4_XS) {
    // -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113
    const u32 table[4] = {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = look_up(a[i], table);
    }
  } else if constexpr (kType == kMXFP4) {
    // 0 1 2 3 | 4 6 8 12 | 0 -1 -2 -3 | -4 -6 -8 -12, halves of the E2M1 values
    const u32 table[4] = {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = look_up(a[i], table);
    }
  }
}

// weight = s q - m dm of two rows; Q6_K has a scale for each 16 columns. s has at most 19
// significant bits, m 11; dm is the same for all blocks of a tile.
template <int kType>
struct Scales {
  float s[2][kType == kQ6_K ? 2 : 1];
  float m[2], dm[2];
};

// Scales of the lane's own block, number 4 half + t of the tile's nb.
template <int kType>
__device__ __forceinline__ Scales<kType> scales_of(const Unit<kType>& unit, int nb, int half) {
  const int t = threadIdx.x & 3;
  Scales<kType> out;
  const float d[2] = {half_to_float(unit.s[3]), half_to_float(unit.s[3] >> 16)};
  out.m[0] = out.m[1] = 0.0f;
  out.dm[0] = out.dm[1] = 1.0f;
  if constexpr (kType == kQ4_K || kType == kQ5_K) {
    const u32 low = unit.s[0] | unit.s[1] << 16, both = unit.s[2];
    const u32 packed = half == 0
                           ? low & 0x3f3f3f3f  // sc, sc, mn, mn of the two rows
                           : (both & 0x0f0f) | (both & 0xf0f0) << 12 | ((low >> 2) & 0x30303030);
    out.s[0][0] = d[0] * (float)(packed & 0xff);
    out.s[1][0] = d[1] * (float)(packed >> 8 & 0xff);
    out.m[0] = (float)(packed >> 16 & 0xff);
    out.m[1] = (float)(packed >> 24);
    out.dm[0] = half_to_float(unit.s[4]);
    out.dm[1] = half_to_float(unit.s[4] >> 16);
  } else if constexpr (kType == kQ6_K) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      out.s[0][h] = 0.25f * d[0] * (float)(i8)unit.s[h];
      out.s[1][h] = 0.25f * d[1] * (float)(i8)(unit.s[h] >> 8);
    }
  } else if constexpr (kType == kIQ4_XS) {
    const int s = half * 4 + t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int low = unit.s[0] >> (8 * r + 4 * (s & 1)) & 15;
      const int high = unit.s[1] >> (16 * r + 2 * s) & 3;
      out.s[r][0] = d[r] * (float)((low | high << 4) - 32);
    }
  } else if constexpr (kType == kMXFP4) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u32 e = unit.s[0] >> (8 * r) & 0xff;
      out.s[r][0] = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      out.s[r][0] = d[r];
      if constexpr (kType == kQ4_0 || kType == kQ5_0) {
        out.m[r] = (kType == kQ4_0 ? 8.0f : 16.0f) * d[r];
      } else if constexpr (kType == kQ4_1 || kType == kQ5_1) {
        out.m[r] = -half_to_float(unit.s[4] >> (16 * r));
      }
    }
  }
  if (!has_whole_tiles<kType>() && 4 * half + t >= nb) {
    out.s[0][0] = out.s[1][0] = out.m[0] = out.m[1] = 0.0f;
  }
  return out;
}

// s of the scales that lane `from` holds.
template <int kType>
__device__ __forceinline__ void factors_from(const Scales<kType>& mine, int from,
                                             float (&s)[2][kType == kQ6_K ? 2 : 1]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    s[r][0] = __shfl_sync(~0u, mine.s[r][0], from);
    if constexpr (kType == kQ6_K) {
      s[r][1] = __shfl_sync(~0u, mine.s[r][1], from);
    }
  }
}

// Calls put(row 0..15 of the band, column, float[8]) for the lane's share of unit u.
template <int kType, typename Put>
__device__ __forceinline__ void decode_unit(const u8* band, int cols, int u, Put put) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int tile = u >> 1, nb = blocks_of_tile<kType>(cols, tile), half = u & 1;
  Unit<kType> unit;
  load_unit<kType, false>(tile_at<kType>(band, cols, tile), band + tile * 32, nb, half, unit);
  const Scales<kType> mine = scales_of<kType>(unit, nb, half);
#pragma unroll
  for (int j = 0; j < kUnitBlocks; ++j) {
    float s[2][kType == kQ6_K ? 2 : 1], m[2] = {};
    factors_from<kType>(mine, (lane & ~3) | j, s);
    if constexpr (has_min<kType>()) {
      m[0] = __shfl_sync(~0u, mine.m[0] * mine.dm[0], (lane & ~3) | j);
      m[1] = __shfl_sync(~0u, mine.m[1] * mine.dm[1], (lane & ~3) | j);
    }
    const int column = (4 * u + j) * 32 + 8 * t;
    if (column >= cols) {
      break;
    }
    u32 a[4];
    decode_block<kType>(unit, j, t, a);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = s[r][kType == kQ6_K ? t >> 1 : 0];
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = factor * (float)(i8)(a[r + 2 * (i >> 2)] >> (8 * (i & 3))) - m[r];
      }
      put(2 * g + r, column, values);
    }
  }
}

template <typename Put>
__device__ __forceinline__ void decode_any(int type, const u8* band, int cols, int u, Put put) {
  switch (type) {
#define KT_CASE(t) \
  case t:          \
    return decode_unit<t>(band, cols, u, put);
    KT_TYPES(KT_CASE)
#undef KT_CASE
  }
}
