// tiles_amx.inl: tile configuration, BF16 weights in tiles, and the peak rate. Included by
// matrix_amx.cpp.
//
// A tile C of 16 activation rows x 16 output rows takes 32 columns at a time:
//   C[row][r] += sum over the columns of A[row][k] * B[k][r]
// B is R16 as it lies in memory: 64-byte lines of 16 output rows x 2 columns.

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

// Tiles 0 .. count - 1 (sums and activations) have `rows` rows, the others (weights) 16; 64 bytes
// each.
inline void configure_tiles(int rows, int count) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < count ? rows : 16);
    config.row_bytes[i] = 64;
  }
  finish_stores(&config);
  _tile_loadconfig(&config);
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
constexpr int64_t kDistances[2] = {kFar, kNear};
inline const uint8_t* weight_lines(const BandJob& job, int64_t line, Bf16Scratch* scratch) {
  const int64_t lines = (static_cast<int64_t>(job.w->cols) + 1) / 2;
  const uint8_t* b = job.band + 64 * line;
  for (const int64_t distance : kDistances) {
    const int64_t later = 64 * line + (distance < 64 * lines ? distance : 64 * lines);
    if (later + 1024 <= 64 * lines) {
      prefetch<16>(job.band + later);
    } else if (later >= 64 * lines && job.next != nullptr) {
      prefetch<16>(job.next + later - 64 * lines);
    }
  }
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
      configure_tiles(count, 6);
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
  configure_tiles(16, 6);
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
