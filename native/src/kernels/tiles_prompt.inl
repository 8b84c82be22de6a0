// tiles_prompt.inl: prompt tokens times quantised weights in bf16 tiles. Included by matrix_amx.cpp
// after tiles_dequant.inl.
//
// Two bands are multiplied together: two tiles of activation rows and two of weights feed four
// tiles of sums, which stay where they are over all columns, while the vector units decode the
// weights two steps ahead into a small ring. More than 48 rows take turns over 256 decoded columns
// instead, with their sums in memory in between. Every sum is formed column after column, 32 at a
// time, whatever the number of rows is: a row has the same bits alone and in company.

struct PromptJob {
  const Matrix* w;
  const uint8_t* bands[2];
  int num_bands;
  const uint8_t* acts;  // rows [m], act_stride bytes apart
  int64_t act_stride;
  int32_t m;
  float* out;
  int64_t out_stride;
  const uint8_t* next;  // the pair of bands after this one, or nullptr
};

constexpr int kBlockLines = 1024;  // bytes of one decoded block: a tile
constexpr int kRing = 4;
constexpr int kLead = 2;  // blocks between decoding and use
constexpr int kResidentRows = 48;

struct alignas(64) PromptScratch {
  uint8_t lines[2][8 * kBlockLines];  // bands
  float sums[kPromptRows][2 * kBandRows];
  DecodedTile decoded;
  DecodedBlock blocks[kBandRows];
};

// Prepared form: x * 2^28 as bf16, every eight columns in the order 0 2 4 6 1 3 5 7.
void prepare_prompt(const float* x, int32_t first, int32_t count, uint8_t* dst) {
  const __m512 power = V::set_f(static_cast<float>(1 << kActExponent));
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0));
  for (int32_t start = 0; start < count; start += 16) {
    const auto bits = reinterpret_cast<__m256i>(
        _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(x + start), power)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 2 * static_cast<int64_t>(first + start)),
                        _mm256_shuffle_epi8(bits, order));
  }
}

constexpr size_t kSumsStride = 2 * kBandRows * sizeof(float);

// Row tiles of one pass: each has `rows` rows; the last one may overlap the one before it, which
// then computes the same sums twice.
struct RowTiles {
  const uint8_t* a[3];
  float* sums[3];
  size_t stride;  // bytes, of a

  RowTiles(const PromptJob& job, PromptScratch* scratch, int32_t first, int32_t count,
           int num_tiles, int rows)
      : stride(static_cast<size_t>(job.act_stride)) {
    for (int i = 0; i < num_tiles; ++i) {
      const int32_t row = first + (i * rows + rows <= count ? i * rows : count - rows);
      a[i] = job.acts + row * job.act_stride;
      sums[i] = scratch->sums[row];
    }
  }
};

// How many row tiles are multiplied at a time. Tiles 2 i and 2 i + 1 are the sums of row tile i for
// the two bands; behind them lie A and B.
template <int kTiles>
struct TilePlan;

template <>
struct TilePlan<1> {
  static constexpr int kConfigured = 6;  // tiles with as many rows as a row tile
  static void zero() {
    _tile_zero(0);
    _tile_zero(1);
  }
  static void step(const RowTiles& rows, int64_t at, const uint8_t* b0, const uint8_t* b1) {
    _tile_loadd(4, rows.a[0] + at, rows.stride);
    _tile_loadd(6, b0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void store(const RowTiles& rows) {
    _tile_stored(0, rows.sums[0], kSumsStride);
    _tile_stored(1, rows.sums[0] + 16, kSumsStride);
  }
};

template <>
struct TilePlan<2> {
  static constexpr int kConfigured = 6;
  static void zero() {
    TilePlan<1>::zero();
    _tile_zero(2);
    _tile_zero(3);
  }
  static void load(const RowTiles& rows) {
    _tile_loadd(0, rows.sums[0], kSumsStride);
    _tile_loadd(1, rows.sums[0] + 16, kSumsStride);
    _tile_loadd(2, rows.sums[1], kSumsStride);
    _tile_loadd(3, rows.sums[1] + 16, kSumsStride);
  }
  static void step(const RowTiles& rows, int64_t at, const uint8_t* b0, const uint8_t* b1) {
    _tile_loadd(6, b0, 64);
    _tile_loadd(4, rows.a[0] + at, rows.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows.a[1] + at, rows.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  static void store(const RowTiles& rows) {
    TilePlan<1>::store(rows);
    _tile_stored(2, rows.sums[1], kSumsStride);
    _tile_stored(3, rows.sums[1] + 16, kSumsStride);
  }
};

template <>
struct TilePlan<3> {
  static constexpr int kConfigured = 7;
  static void zero() {
    TilePlan<2>::zero();
    _tile_zero(4);
    _tile_zero(5);
  }
  // One tile for A and one for B: seven loads for six products.
  static void step(const RowTiles& rows, int64_t at, const uint8_t* b0, const uint8_t* b1) {
    _tile_loadd(7, b0, 64);
    _tile_loadd(6, rows.a[0] + at, rows.stride);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(6, rows.a[1] + at, rows.stride);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, rows.a[2] + at, rows.stride);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(5, 6, 7);
    _tile_loadd(6, rows.a[1] + at, rows.stride);
    _tile_dpbf16ps(3, 6, 7);
    _tile_loadd(6, rows.a[0] + at, rows.stride);
    _tile_dpbf16ps(1, 6, 7);
  }
  static void store(const RowTiles& rows) {
    TilePlan<2>::store(rows);
    _tile_stored(4, rows.sums[2], kSumsStride);
    _tile_stored(5, rows.sums[2] + 16, kSumsStride);
  }
};

// The same for the last band of an odd number of bands: tile 2 i + 1 stays unused.
inline void single_step(const RowTiles& rows, int64_t at, const uint8_t* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(4, rows.a[0] + at, rows.stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, rows.a[1] + at, rows.stride);
  _tile_dpbf16ps(2, 5, 6);
}

inline void store_sums(const PromptJob& job, const PromptScratch& scratch, const __m512* factors) {
  finish_stores(&scratch);
  for (int32_t i = 0; i < job.m; ++i) {
    float* out = job.out + i * job.out_stride;
    for (int band = 0; band < job.num_bands; ++band) {
      V::store_f(out + 16 * band, V::mul(V::load_f(scratch.sums[i] + 16 * band), factors[band]));
    }
  }
}

template <class Decoder>
struct Source {
  const PromptJob& job;
  RowPowers powers[2];

  explicit Source(const PromptJob& j)
      : job(j),
        powers{RowPowers(Decoder::bound(*j.w, j.bands[0]), Decoder::kMost),
               RowPowers(Decoder::bound(*j.w, j.bands[1]), Decoder::kMost)} {
    fetch_scales();
  }
  // Asks for the scales of the next pair, which its bound() reads before anything else.
  void fetch_scales() const {
    if (Decoder::kScales < 0 || job.next == nullptr) {
      return;
    }
    for (int band = 0; band < job.num_bands; ++band) {
      const uint8_t* scales = job.next + band * job.w->band_bytes + Decoder::kScales;
      for (int32_t first = 0; first < job.w->cols; first += kTileCols) {
        prefetch<Decoder::kScaleLines>(scales);
        scales += tile_bytes(Decoder::kType);
      }
    }
  }
  Decoder tile(int band, int32_t index, int nb) const {
    const uint8_t* tiles = job.bands[band] + band_header(job.w->type, job.w->cols);
    return Decoder(tiles + index * tile_bytes(Decoder::kType), job.bands[band] + index * 32, nb,
                   powers[band]);
  }
  // What to ask for while a tile is decoded: one kAhead bytes later, or as far into the next pair.
  const uint8_t* ahead(int band, int32_t index) const {
    constexpr int64_t kStep = tile_bytes(Decoder::kType);
    constexpr auto kDistance = static_cast<int32_t>((kAhead + kStep / 2) / kStep);
    const int32_t tiles = (job.w->cols + kTileCols - 1) / kTileCols;
    const int32_t later = index + (kDistance < tiles ? kDistance : tiles);
    if (later < tiles) {
      return job.bands[band] + later * kStep;
    }
    const int64_t offset = band * job.w->band_bytes + (later - tiles) * kStep;
    return job.next == nullptr ? nullptr : job.next + offset;
  }
  int blocks(int32_t index) const {
    const int32_t left = (job.w->cols - index * kTileCols) / 32;
    return left < 8 ? left : 8;
  }
  void store(const PromptScratch& scratch) const {
    const __m512 factors[2] = {powers[0].factor(Decoder::kExponent - kActExponent),
                               powers[1].factor(Decoder::kExponent - kActExponent)};
    store_sums(job, scratch, factors);
  }
};

// Up to 48 rows and two bands: sums stay in tiles.
template <class Decoder, int kTiles>
__attribute__((noinline)) void multiply_resident(const PromptJob& job, PromptScratch* scratch) {
  using Plan = TilePlan<kTiles>;
  constexpr int kStep = block_step(Decoder::kType);
  constexpr int kStepLines = (kStep + 63) / 64;
  const Source<Decoder> source(job);
  const int rows = (job.m + kTiles - 1) / kTiles;
  const RowTiles row_tiles(job, scratch, 0, job.m, kTiles, rows);
  configure_tiles(rows, Plan::kConfigured);
  Plan::zero();
  const int32_t num_blocks = job.w->cols / 32;
  const auto line = [&](int band, int32_t block) {
    return scratch->lines[band] + block % kRing * kBlockLines;
  };
  for (int32_t tile = 0; 8 * tile < num_blocks; ++tile) {
    const int nb = source.blocks(tile);
    const Decoder first = source.tile(0, tile, nb), second = source.tile(1, tile, nb);
    const uint8_t* const ahead[2] = {source.ahead(0, tile), source.ahead(1, tile)};
    for (int b = 0; b < nb; ++b) {
      const int32_t block = 8 * tile + b;
      if (ahead[0] != nullptr) {
        prefetch<kStepLines>(ahead[0] + b * kStep);
        prefetch<kStepLines>(ahead[1] + b * kStep);
      }
      first.block(b, line(0, block));
      second.block(b, line(1, block));
      if (block >= kLead) {
        finish_stores(scratch);
        Plan::step(row_tiles, 64 * (block - kLead), line(0, block - kLead), line(1, block - kLead));
      }
    }
  }
  finish_stores(scratch);
  for (int32_t block = num_blocks < kLead ? 0 : num_blocks - kLead; block < num_blocks; ++block) {
    Plan::step(row_tiles, 64 * block, line(0, block), line(1, block));
  }
  Plan::store(row_tiles);
  source.store(*scratch);
}

// One tile of columns of any number of rows, in passes of at most 32: adds to the sums in memory.
inline void multiply_tile(const PromptJob& job, int32_t tile, int nb, PromptScratch* scratch) {
  finish_stores(scratch);
  const int32_t passes = (job.m + 31) / 32;
  const int32_t rows = ((job.m + passes - 1) / passes + 1) / 2;
  int32_t first = 0;
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t last = (pass + 1) * job.m / passes;
    const RowTiles row_tiles(job, scratch, first, last - first, 2, rows);
    first = last;
    if (job.num_bands == 2) {
      if (tile == 0) {
        TilePlan<2>::zero();
      } else {
        TilePlan<2>::load(row_tiles);
      }
      for (int b = 0; b < nb; ++b) {
        TilePlan<2>::step(row_tiles, 512 * tile + 64 * b, scratch->lines[0] + b * kBlockLines,
                          scratch->lines[1] + b * kBlockLines);
      }
      TilePlan<2>::store(row_tiles);
      continue;
    }
    _tile_zero(0);
    _tile_zero(2);
    if (tile != 0) {
      _tile_loadd(0, row_tiles.sums[0], kSumsStride);
      _tile_loadd(2, row_tiles.sums[1], kSumsStride);
    }
    for (int b = 0; b < nb; ++b) {
      single_step(row_tiles, 512 * tile + 64 * b, scratch->lines[0] + b * kBlockLines);
    }
    _tile_stored(0, row_tiles.sums[0], kSumsStride);
    _tile_stored(2, row_tiles.sums[1], kSumsStride);
  }
}

inline void configure_passes(const PromptJob& job) {
  const int32_t passes = (job.m + 31) / 32;
  configure_tiles(((job.m + passes - 1) / passes + 1) / 2, TilePlan<2>::kConfigured);
}

template <class Decoder>
__attribute__((noinline)) void multiply_passes(const PromptJob& job, PromptScratch* scratch) {
  constexpr int kStep = block_step(Decoder::kType);
  const Source<Decoder> source(job);
  configure_passes(job);
  for (int32_t tile = 0; tile * kTileCols < job.w->cols; ++tile) {
    const int nb = source.blocks(tile);
    for (int band = 0; band < job.num_bands; ++band) {
      const Decoder decoder = source.tile(band, tile, nb);
      const uint8_t* ahead = source.ahead(band, tile);
      for (int b = 0; b < nb; ++b) {
        if (ahead != nullptr) {
          prefetch<(kStep + 63) / 64>(ahead + b * kStep);
        }
        decoder.block(b, scratch->lines[band] + b * kBlockLines);
      }
    }
    multiply_tile(job, tile, nb, scratch);
  }
  source.store(*scratch);
}

// One decoded tile as bf16: (stored - offset) * scale - min.
template <class T>
void convert_tile(const DecodedTile& tile, int nb, uint8_t* lines) {
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  const V::I byte = V::set32(255), offset = V::set32(T::kOffset);
  for (int eight = 0; eight < 4 * nb; ++eight) {
    const int group = T::kGroup16 ? eight / 2 : eight / 4;
    const __m512 scale = V::load_f(tile.scale[group]);
    const __m512 min = T::kMin ? V::load_f(tile.min[group]) : V::zero();
    const V::I words[2] = {V::load(tile.lines[2 * eight]), V::load(tile.lines[2 * eight + 1])};
    const auto column = [&](int k) {
      const V::I stored = V::and_(V::srl32(words[k / 4], 8 * (k % 4)), byte);
      const __m512 value = _mm512_fmsub_ps(V::to_float(V::sub32(stored, offset)), scale, min);
      return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    };
    for (int i = 0; i < 4; ++i) {
      const V::I second = _mm512_slli_epi32(column(kOrder[2 * i + 1]), 16);
      V::store(lines + 64 * (4 * eight + i), V::or_(column(kOrder[2 * i]), second));
    }
  }
}

// Types without a decoder of their own. decode(band, tile, out): one tile of job.bands[band].
template <class T, class Decode>
void multiply_converted(const PromptJob& job, PromptScratch* scratch, Decode decode) {
  configure_passes(job);
  for (int32_t tile = 0; tile * kTileCols < job.w->cols; ++tile) {
    for (int band = 0; band < job.num_bands; ++band) {
      decode(job.bands[band], tile, &scratch->decoded);
      convert_tile<T>(scratch->decoded, 8, scratch->lines[band]);
    }
    multiply_tile(job, tile, 8, scratch);
  }
  const __m512 factors[2] = {_mm512_scalef_ps(V::set_f(1.0f), V::set_f(-kActExponent)),
                             _mm512_scalef_ps(V::set_f(1.0f), V::set_f(-kActExponent))};
  store_sums(job, *scratch, factors);
}

// Q2_K, Q3_K.
template <class Format, class T>
void multiply_prompt_format(const PromptJob& job, PromptScratch* scratch) {
  const int64_t step = tile_bytes(job.w->type);
  const int64_t header = band_header(job.w->type, job.w->cols);
  multiply_converted<T>(job, scratch, [&](const uint8_t* band, int32_t tile, DecodedTile* out) {
    decode_to_memory<Format>(band + header + tile * step, band + tile * 32, 8, out, nullptr);
  });
}

// Types kept as GGUF blocks.
void multiply_prompt_gguf(const PromptJob& job, PromptScratch* scratch) {
  const int32_t type = job.w->type, block_bytes = type_traits(type)->block_bytes;
  multiply_converted<Block8>(
      job, scratch, [&](const uint8_t* band, int32_t tile, DecodedTile* out) {
        decode_gguf_tile(type, block_bytes, band + int64_t{tile} * kBandRows * block_bytes, nullptr,
                         scratch->blocks, out);
      });
}

template <class Decoder>
void multiply_decoded(const PromptJob& job, PromptScratch* scratch) {
  if (job.num_bands == 2 && job.m <= 16) {
    multiply_resident<Decoder, 1>(job, scratch);
  } else if (job.num_bands == 2 && job.m <= 32) {
    multiply_resident<Decoder, 2>(job, scratch);
  } else if (job.num_bands == 2 && job.m <= kResidentRows) {
    multiply_resident<Decoder, 3>(job, scratch);
  } else {
    multiply_passes<Decoder>(job, scratch);
  }
}

void multiply_type(const PromptJob& job, PromptScratch* scratch) {
  switch (job.w->type) {
    case kQ4_0:
      return multiply_decoded<NibbleDecoder<kQ4_0, 4, 8>>(job, scratch);
    case kQ4_1:
      return multiply_decoded<NibbleDecoder<kQ4_1, 4, 0>>(job, scratch);
    case kQ5_0:
      return multiply_decoded<NibbleDecoder<kQ5_0, 5, 16>>(job, scratch);
    case kQ5_1:
      return multiply_decoded<NibbleDecoder<kQ5_1, 5, 0>>(job, scratch);
    case kQ8_0:
      return multiply_decoded<EightDecoder>(job, scratch);
    case kQ4_K:
      return multiply_decoded<SuperDecoder<kQ4_K, 4>>(job, scratch);
    case kQ5_K:
      return multiply_decoded<SuperDecoder<kQ5_K, 5>>(job, scratch);
    case kQ6_K:
      return multiply_decoded<SixDecoder>(job, scratch);
    case kIQ4_NL:
      return multiply_decoded<NonlinearDecoder>(job, scratch);
    case kIQ4_XS:
      return multiply_decoded<NonlinearSuperDecoder>(job, scratch);
    case kMXFP4:
      return multiply_decoded<MxDecoder>(job, scratch);
    case kQ2_K:
      return multiply_prompt_format<Q2_K, Unsigned2>(job, scratch);
    case kQ3_K:
      return multiply_prompt_format<Q3_K, Offset3>(job, scratch);
    default:
      return multiply_prompt_gguf(job, scratch);
  }
}

void multiply_prompt(const Matrix& w, int32_t expert, int32_t band, int32_t num_bands,
                     const uint8_t* acts, int64_t act_stride, int32_t m, float* out,
                     int64_t out_stride, void* scratch, const uint8_t* next) {
  PromptJob job;
  job.w = &w;
  job.bands[0] = band_at(w, expert, band);
  job.bands[1] = band_at(w, expert, band + num_bands - 1);
  job.num_bands = num_bands;
  job.next = next;
  job.acts = acts;
  job.act_stride = act_stride;
  job.m = m;
  job.out = out;
  job.out_stride = out_stride;
  multiply_type(job, static_cast<PromptScratch*>(scratch));
  _tile_release();
}
