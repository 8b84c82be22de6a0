// tiles_amx.inl: products of many rows in AMX tiles. Included by matrix_simd.inl for the AMX file.
//
// A tile C of 16 activation rows x 16 output rows takes one step of columns at a time:
//   C[row][r] += sum over the step of A[row][k] * B[k][r]
// B is R16 as it lies in memory: 64-byte lines of 16 output rows x 4 (int8) or 2 (bf16) columns.
// int8 steps are as wide as a scale (32 or 16 columns), so that C is the exact integer that the
// AVX-512 VNNI kernel computes, and is scaled by the same f32 operations: equal bits.

// Tile instructions read memory behind the compiler's back (gcc's intrinsics declare none of it, or
// eight bytes): everything stored at p and elsewhere must be in memory before them.
inline void finish_stores(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Tiles 0-3 are C, 4-5 A (a_rows x a_bytes), 6-7 B (b_rows lines).
inline void configure_tiles(int a_rows, int a_bytes, int b_rows) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? a_rows : b_rows);
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? a_bytes : 64);
  }
  finish_stores(&config);
  _tile_loadconfig(&config);
}

// Everything about up to 16 activation rows that one 256-column tile needs.
struct alignas(64) RowGroup {
  int8_t copy[16][256];  // rows gathered from arbitrary places; tile loads need one stride
  // Two batches of two steps: one in the tiles' hands, one being scaled. Together 4 KiB: more would
  // make stores of one batch look like (4 KiB aliases of) the loads of the other.
  int32_t sums[2][2][16][16];
  float scale[16][8];
  float sum[16][8];
  float sum16[16][16];
};

// Copies kBytes * nb bytes; full tiles, nearly all, without a call.
template <int kBytes>
inline void copy_blocks(void* to, const uint8_t* from, int nb) {
  if (nb == 8) {
    __builtin_memcpy(to, from, 8 * kBytes);
  } else {
    __builtin_memcpy(to, from, static_cast<size_t>(kBytes * nb));
  }
}

// Address and stride of the int8 columns of 16 rows; x[i] points at the rows' prepared forms.
inline const int8_t* gather_columns(const uint8_t* const* x, int32_t tile, int nb, RowGroup* group,
                                    int64_t* stride) {
  *stride = x[1] - x[0];
  bool regular = *stride != 0;
  for (int i = 2; i < 16; ++i) {
    regular = regular && x[i] - x[i - 1] == *stride;
  }
  if (regular) {
    return reinterpret_cast<const int8_t*>(x[0]) + kTileCols * tile;
  }
  for (int i = 0; i < 16; ++i) {
    copy_blocks<32>(group->copy[i], x[i] + kTileCols * tile, nb);
  }
  *stride = 256;
  return group->copy[0];
}

// Integer sums of one or two steps from `step` on.
template <int kCols>
inline void multiply_steps(const int8_t* a, int64_t stride, const uint8_t* lines, int step,
                           int count, int32_t (*sums)[16][16]) {
  a += step * kCols;
  lines += step * kCols * 16;
  const auto row_stride = static_cast<size_t>(stride);
  _tile_zero(0);
  _tile_loadd(4, a, row_stride);
  _tile_loadd(6, lines, 64);
  _tile_dpbssd(0, 4, 6);
  _tile_stored(0, sums[0], 64);
  if (count > 1) {
    _tile_zero(1);
    _tile_loadd(5, a + kCols, row_stride);
    _tile_loadd(7, lines + 16 * kCols, 64);
    _tile_dpbssd(1, 5, 7);
    _tile_stored(1, sums[1], 64);
  }
}

// Scales the sums of block b (in sums[unit] and, for 16-column scales, unit + 1).
template <class T>
inline __attribute__((always_inline)) void add_sums(const DecodedTile& w, const RowGroup& group,
                                                    const int32_t (*sums)[16][16], int b, int unit,
                                                    V::F* total) {
  if constexpr (T::kGroup16) {
    const V::F scale0 = V::load_f(w.scale[2 * b]), scale1 = V::load_f(w.scale[2 * b + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      V::F part = V::mul(V::to_float(V::load_i(sums[unit][i])), scale0);
      part = V::fma(V::to_float(V::load_i(sums[unit + 1][i])), scale1, part);
      total[i] = V::fma(part, V::set_f(group.scale[i][b]), total[i]);
    }
    if constexpr (T::kMin) {
      const V::F min0 = V::load_f(w.min[2 * b]), min1 = V::load_f(w.min[2 * b + 1]);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        total[i] = V::fnma(min0, V::set_f(group.sum16[i][2 * b]), total[i]);
        total[i] = V::fnma(min1, V::set_f(group.sum16[i][2 * b + 1]), total[i]);
      }
    }
  } else {
    const V::F scale = V::load_f(w.scale[b]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      total[i] = V::fma(V::to_float(V::load_i(sums[unit][i])),
                        V::mul(scale, V::set_f(group.scale[i][b])), total[i]);
    }
    if constexpr (T::kMin) {
      const V::F min = V::load_f(w.min[b]);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        total[i] = V::fnma(min, V::set_f(group.sum[i][b]), total[i]);
      }
    }
  }
}

// Adds one decoded (signed) tile to rows [first, first + count), count <= 16.
template <class T>
__attribute__((noinline)) void add_decoded_16(const BandJob& job, const DecodedTile& decoded,
                                              int32_t tile, int32_t first, int32_t count,
                                              RowGroup* group) {
  constexpr int kCols = T::kGroup16 ? 16 : 32;
  constexpr int kUnits = 32 / kCols;  // steps per block
  const ActLayout at = act_layout(job.w->cols);
  const int nb = job.tile_blocks(tile);
  const uint8_t* x[16];
  gather_rows<16>(job, first, count, x);
  int64_t stride;
  const int8_t* a = gather_columns(x, tile, nb, group, &stride);
  for (int i = 0; i < 16; ++i) {
    copy_blocks<4>(group->scale[i], x[i] + at.scale + 32 * tile, nb);
    if constexpr (T::kMin && T::kGroup16) {
      copy_blocks<8>(group->sum16[i], x[i] + at.sum16 + 64 * tile, nb);
    } else if constexpr (T::kMin) {
      copy_blocks<4>(group->sum[i], x[i] + at.sum + 32 * tile, nb);
    }
  }
  finish_stores(group);
  float* out = job.out + first * job.out_stride;
  V::F total[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    total[i] = tile == 0 || i >= count ? V::zero() : V::load_f(out + i * job.out_stride);
  }
  // The tiles work on one batch of steps while the vector units scale the one before: reading a
  // tile's sums right behind its store would wait for the whole chain of load, dot and store.
  const int num_steps = kUnits * nb;
  const auto multiply_batch = [&](int step) {
    const int left = num_steps - step;
    multiply_steps<kCols>(a, stride, &decoded.lines[0][0], step, left < 2 ? left : 2,
                          group->sums[step / 2 % 2]);
  };
  multiply_batch(0);
  for (int step = 0; step < num_steps; step += 2) {
    if (step + 2 < num_steps) {
      multiply_batch(step + 2);
    }
    for (int unit = 0; unit < 2 && step + unit < num_steps; unit += kUnits) {
      add_sums<T>(decoded, *group, group->sums[step / 2 % 2], (step + unit) / kUnits, unit, total);
    }
  }
  for (int i = 0; i < count; ++i) {
    V::store_f(out + i * job.out_stride, total[i]);
  }
}

template <class T>
void add_decoded_rows(const BandJob& job, const DecodedTile& decoded, int32_t tile) {
  if (tile == 0) {
    configure_tiles(16, T::kGroup16 ? 16 : 32, T::kGroup16 ? 4 : 8);
  }
  // Behind the decoded tile and the block that multiply_gguf decodes into.
  auto* group = reinterpret_cast<RowGroup*>(static_cast<uint8_t*>(job.scratch) + 8192);
  for (int32_t first = 0; first < job.m; first += 16) {
    const int32_t left = job.m - first;
    add_decoded_16<T>(job, decoded, tile, first, left < 16 ? left : 16, group);
  }
  if (tile == job.num_tiles() - 1) {
    _tile_release();
  }
}

// ---- BF16 weights ----
// Behind its f32 form a row is also prepared as hi + lo, both bf16 (hi = x rounded, lo = the rest
// rounded): 16 bits of precision, where bf16 alone would cost a KL of 1.4e-3. For every 32 columns
// the products with hi, then those with lo are added to the sums. Every number of rows takes this
// path, so that a row's bits do not depend on its company.

inline int64_t plane_bytes(int64_t cols) { return bf16_plane_bytes(cols); }

// Planes hi and lo of one row, padded with zeros to 32 columns.
void prepare_bf16(const float* x, int32_t cols, int32_t first, int32_t count, uint8_t* dst) {
  const int64_t plane = plane_bytes(cols);
  dst += float_row_bytes(cols);
  for (int32_t start = 0; start < count; start += 16) {
    const int32_t left = count - start;
    const auto mask = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xffffu);
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + start);
    const auto hi = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16));
    const auto lo = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_sub_ps(value, rounded)));
    uint8_t* to = dst + 2 * static_cast<int64_t>(first + start);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), hi);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + plane), lo);
  }
  // The loop wrote whole groups of 16; one more may be missing up to a multiple of 32.
  if (first + count == cols && align_up(cols, 32) != align_up(cols, 16)) {
    const int64_t used = 2 * align_up(cols, 16);
    __builtin_memset(dst + used, 0, 32);
    __builtin_memset(dst + plane + used, 0, 32);
  }
}

struct alignas(64) Bf16Scratch {
  uint8_t tail[1024];  // last lines of a band, padded with zeros
  float sums[16][16];
  uint8_t rows[16][2][512];  // gathered rows: 256 columns of hi and of lo
};

// Where the planes of 16 rows lie for tile loads: base address and stride, 0 when the rows are not
// equally far apart and must be gathered.
struct PlaneRows {
  const uint8_t* x[16];
  int64_t stride;
};

inline void find_planes(const BandJob& job, int32_t first, int32_t count, PlaneRows* rows) {
  gather_rows<16>(job, first, count, rows->x);
  for (const uint8_t*& row : rows->x) {
    row += float_row_bytes(job.w->cols);
  }
  rows->stride = count > 1 ? rows->x[1] - rows->x[0] : 64;
  for (int i = 2; i < count; ++i) {
    if (rows->x[i] - rows->x[i - 1] != rows->stride) {
      rows->stride = 0;
    }
  }
}

// 16 weight lines (32 columns) from `line` on, padded with zeros behind the last column.
inline const uint8_t* weight_lines(const BandJob& job, int64_t line, Bf16Scratch* scratch) {
  const int64_t lines = (static_cast<int64_t>(job.w->cols) + 1) / 2;
  const uint8_t* b = job.band + 64 * line;
  prefetch<16>(b + kAhead);
  if (line + 16 <= lines) {
    return b;
  }
  __builtin_memset(scratch->tail, 0, sizeof(scratch->tail));
  __builtin_memcpy(scratch->tail, b, static_cast<size_t>(64 * (lines - line)));
  return scratch->tail;
}

inline void store_rows(const BandJob& job, int32_t first, int32_t count, const float (*sums)[16]) {
  finish_stores(sums);
  for (int i = 0; i < count; ++i) {
    V::store_f(job.out + (first + i) * job.out_stride, V::load_f(sums[i]));
  }
}

// Rows [first, first + count), count <= 16, anywhere in memory.
__attribute__((noinline)) void bf16_rows(const BandJob& job, int32_t first, int32_t count,
                                         Bf16Scratch* scratch) {
  const int64_t plane = plane_bytes(job.w->cols);
  PlaneRows rows;
  find_planes(job, first, count, &rows);
  _tile_zero(0);
  for (int64_t line = 0; 2 * line < job.w->cols; line += 16) {
    const uint8_t* b = weight_lines(job, line, scratch);
    const uint8_t* hi = rows.x[0] + 4 * line;
    const uint8_t* lo = hi + plane;
    int64_t stride = rows.stride;
    if (stride == 0) {
      const int64_t offset = 4 * line % 512;
      if (offset == 0) {
        const int64_t left = plane - 4 * line;
        const auto bytes = static_cast<size_t>(left < 512 ? left : 512);
        for (int i = 0; i < count; ++i) {
          __builtin_memcpy(scratch->rows[i][0], rows.x[i] + 4 * line, bytes);
          __builtin_memcpy(scratch->rows[i][1], rows.x[i] + 4 * line + plane, bytes);
        }
      }
      hi = scratch->rows[0][0] + offset;
      lo = hi + 512;
      stride = 1024;
    }
    finish_stores(scratch);
    const auto row_stride = static_cast<size_t>(stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(4, hi, row_stride);
    _tile_loadd(5, lo, row_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 5, 6);
  }
  _tile_stored(0, scratch->sums, 64);
  store_rows(job, first, count, scratch->sums);
}

// Rows [first, first + 64), every 16 equally far apart: four tiles of sums share each weight tile.
__attribute__((noinline)) void bf16_rows64(const BandJob& job, int32_t first,
                                           const PlaneRows (&rows)[4], Bf16Scratch* scratch) {
  const int64_t plane = plane_bytes(job.w->cols);
  const auto s0 = static_cast<size_t>(rows[0].stride), s1 = static_cast<size_t>(rows[1].stride);
  const auto s2 = static_cast<size_t>(rows[2].stride), s3 = static_cast<size_t>(rows[3].stride);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t line = 0; 2 * line < job.w->cols; line += 16) {
    const uint8_t* b = weight_lines(job, line, scratch);
    finish_stores(scratch);
    const int64_t at = 4 * line;
    _tile_loadd(6, b, 64);
    _tile_loadd(4, rows[0].x[0] + at, s0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows[1].x[0] + at, s1);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, rows[2].x[0] + at, s2);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, rows[3].x[0] + at, s3);
    _tile_dpbf16ps(3, 5, 6);
    _tile_loadd(4, rows[0].x[0] + at + plane, s0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows[1].x[0] + at + plane, s1);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, rows[2].x[0] + at + plane, s2);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, rows[3].x[0] + at + plane, s3);
    _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, scratch->sums, 64);
  store_rows(job, first, 16, scratch->sums);
  _tile_stored(1, scratch->sums, 64);
  store_rows(job, first + 16, 16, scratch->sums);
  _tile_stored(2, scratch->sums, 64);
  store_rows(job, first + 32, 16, scratch->sums);
  _tile_stored(3, scratch->sums, 64);
  store_rows(job, first + 48, 16, scratch->sums);
}

void multiply_bf16(const BandJob& job) {
  auto* scratch = static_cast<Bf16Scratch*>(job.scratch);
  int32_t configured = 0;
  for (int32_t first = 0; first < job.m;) {
    const int32_t left = job.m - first;
    const int32_t count = left < 16 ? left : 16;
    if (count != configured) {
      configure_tiles(count, 64, 16);
      configured = count;
    }
    if (left >= 64) {
      PlaneRows rows[4];
      bool regular = true;
      for (int g = 0; g < 4; ++g) {
        find_planes(job, first + 16 * g, 16, &rows[g]);
        regular = regular && rows[g].stride != 0;
      }
      if (regular) {
        bf16_rows64(job, first, rows, scratch);
        first += 64;
        continue;
      }
    }
    bf16_rows(job, first, count, scratch);
    first += count;
  }
  _tile_release();
}

// ---- peak rate ----

int64_t peak(int32_t kind, int64_t rounds) {
  if (kind < 0 || kind > 1) {
    return 0;
  }
  alignas(64) uint8_t zeros[1024] = {};
  configure_tiles(16, 64, 16);
  finish_stores(zeros);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  // Tile intrinsics are volatile, so nothing here is moved or dropped.
  for (int64_t round = 0; round < rounds; ++round) {
    if (kind == 0) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
  return rounds * 4 * 16 * 16 * (kind == 0 ? 64 : 32);
}
