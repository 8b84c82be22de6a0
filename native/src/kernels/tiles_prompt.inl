// tiles_prompt.inl: prompt tokens times quantised weights in bf16 tiles. Included by matrix_amx.cpp
// after tiles_dequant.inl.
//
// Two bands are multiplied together: two tiles of activation rows and two of weights feed four
// tiles of sums. The vector units decode weights all the while, tile instructions among their own:
// up to 48 rows the sums stay in tiles over all columns and the weights are decoded two steps ahead
// into a small ring; more rows take turns over 256 decoded columns, with their sums in memory in
// between, while the next 256 are decoded. Both run on from one pair of bands to the next. Every
// sum is formed column after column, 32 at a time, whatever the number of rows is: a row has the
// same bits alone and in company.

struct PromptJob {
  const Matrix* w;
  const uint8_t* first;  // the first of num_bands bands
  int32_t num_bands;
  const PromptRows& rows;
  float* out;
  int64_t out_stride;
  const uint8_t* next;  // the bands after these, or nullptr

  int32_t num_pairs() const { return (num_bands + 1) / 2; }
  // An odd last band takes the place of its missing neighbour, whose sums are dropped.
  const uint8_t* band(int32_t pair, int which) const {
    const int32_t index = 2 * pair + which;
    return first + (index < num_bands ? index : num_bands - 1) * w->band_bytes;
  }
  int32_t num_blocks() const { return w->cols / 32; }
  int32_t num_tiles() const { return (w->cols + kTileCols - 1) / kTileCols; }
  int blocks_of(int32_t tile) const {
    const int32_t left = num_blocks() - 8 * tile;
    return left < 8 ? left : 8;
  }
};

constexpr int kBlockLines = 1024;  // bytes of one decoded block: a tile
constexpr int kRing = 4;
constexpr int kLead = 2;  // blocks between decoding and use
constexpr int kResidentRows = 48;

struct alignas(64) PromptScratch {
  uint8_t lines[2][2][8 * kBlockLines];  // of 256 columns and the next: bands
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
      : stride(static_cast<size_t>(job.rows.row_stride)) {
    for (int i = 0; i < num_tiles; ++i) {
      const int32_t row = first + (i * rows + rows <= count ? i * rows : count - rows);
      a[i] = job.rows.acts + row * job.rows.row_stride;
      sums[i] = scratch->sums[row];
    }
  }
};

// The products of one block of 32 columns: activations `at` bytes behind each row, decoded lines of
// two bands.
struct Step {
  const RowTiles& rows;
  int64_t at;
  const uint8_t* b0;
  const uint8_t* b1;
};

// How many row tiles are multiplied at a time. Tiles 2 i and 2 i + 1 are the sums of row tile i for
// the two bands; behind them lie A and B. portion<0 .. 7>: the instructions of a step, to be spread
// over the decoding of two blocks; even ones only (the odd ones are empty) for one block.
template <int kTiles>
struct TilePlan;

template <>
struct TilePlan<1> {
  static constexpr int kConfigured = 6;  // tiles with as many rows as a row tile
  static void zero() {
    _tile_zero(0);
    _tile_zero(1);
  }
  template <int kPortion>
  static KT_INLINE void portion(const Step& s) {
    if constexpr (kPortion == 0) {
      _tile_loadd(6, s.b0, 64);
      _tile_loadd(4, s.rows.a[0] + s.at, s.rows.stride);
      _tile_dpbf16ps(0, 4, 6);
    } else if constexpr (kPortion == 4) {
      _tile_loadd(7, s.b1, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
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
  template <int kPortion>
  static KT_INLINE void portion(const Step& s) {
    if constexpr (kPortion == 0) {
      _tile_loadd(6, s.b0, 64);
      _tile_loadd(4, s.rows.a[0] + s.at, s.rows.stride);
      _tile_dpbf16ps(0, 4, 6);
    } else if constexpr (kPortion == 2) {
      _tile_loadd(5, s.rows.a[1] + s.at, s.rows.stride);
      _tile_dpbf16ps(2, 5, 6);
    } else if constexpr (kPortion == 4) {
      _tile_loadd(7, s.b1, 64);
      _tile_dpbf16ps(1, 4, 7);
    } else if constexpr (kPortion == 6) {
      _tile_dpbf16ps(3, 5, 7);
    }
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
  template <int kPortion>
  static KT_INLINE void portion(const Step& s) {
    if constexpr (kPortion == 0) {
      _tile_loadd(7, s.b0, 64);
      _tile_loadd(6, s.rows.a[0] + s.at, s.rows.stride);
      _tile_dpbf16ps(0, 6, 7);
    } else if constexpr (kPortion == 1) {
      _tile_loadd(6, s.rows.a[1] + s.at, s.rows.stride);
      _tile_dpbf16ps(2, 6, 7);
    } else if constexpr (kPortion == 3) {
      _tile_loadd(6, s.rows.a[2] + s.at, s.rows.stride);
      _tile_dpbf16ps(4, 6, 7);
    } else if constexpr (kPortion == 4) {
      _tile_loadd(7, s.b1, 64);
      _tile_dpbf16ps(5, 6, 7);
    } else if constexpr (kPortion == 5) {
      _tile_loadd(6, s.rows.a[1] + s.at, s.rows.stride);
      _tile_dpbf16ps(3, 6, 7);
    } else if constexpr (kPortion == 7) {
      _tile_loadd(6, s.rows.a[0] + s.at, s.rows.stride);
      _tile_dpbf16ps(1, 6, 7);
    }
  }
  static void store(const RowTiles& rows) {
    TilePlan<2>::store(rows);
    _tile_stored(4, rows.sums[2], kSumsStride);
    _tile_stored(5, rows.sums[2] + 16, kSumsStride);
  }
};

// Two row tiles of rows that take turns. Their activations come from the L2 cache and go by: loaded
// as a stream they leave the L1 cache to the decoded lines and the sums (64 rows: a third faster).
struct PassPlan : TilePlan<2> {
  template <int kPortion>
  static KT_INLINE void portion(const Step& s) {
    if constexpr (kPortion == 0) {
      _tile_loadd(6, s.b0, 64);
      _tile_stream_loadd(4, s.rows.a[0] + s.at, s.rows.stride);
      _tile_dpbf16ps(0, 4, 6);
    } else if constexpr (kPortion == 2) {
      _tile_stream_loadd(5, s.rows.a[1] + s.at, s.rows.stride);
      _tile_dpbf16ps(2, 5, 6);
    } else {
      TilePlan<2>::portion<kPortion>(s);
    }
  }
};

// A whole step, nothing in between.
template <class Plan>
KT_INLINE void run_step(const Step& s) {
  Plan::template portion<0>(s);
  Plan::template portion<1>(s);
  Plan::template portion<2>(s);
  Plan::template portion<3>(s);
  Plan::template portion<4>(s);
  Plan::template portion<5>(s);
  Plan::template portion<6>(s);
  Plan::template portion<7>(s);
}

// The sums of a pair of bands to the result.
inline void store_sums(const PromptJob& job, int32_t pair, const PromptScratch& scratch,
                       const __m512 (&factors)[2]) {
  finish_stores(&scratch);
  const int bands = 2 * pair + 1 < job.num_bands ? 2 : 1;
  float* out = job.out + int64_t{pair} * 2 * kBandRows;
  for (int32_t i = 0; i < job.rows.m; ++i, out += job.out_stride) {
    V::store_f(out, V::mul(V::load_f(scratch.sums[i]), factors[0]));
    if (bands == 2) {
      V::store_f(out + 16, V::mul(V::load_f(scratch.sums[i] + 16), factors[1]));
    }
  }
}

// The weights of a pair of bands.
template <class Decoder>
struct Source {
  const uint8_t* bands[2];
  RowPowers powers[2];

  Source() = default;
  Source(const PromptJob& job, int32_t pair) {
    for (int i = 0; i < 2; ++i) {
      bands[i] = job.band(pair, i);
      powers[i] = RowPowers(Decoder::bound(*job.w, bands[i]), Decoder::kMost);
    }
    fetch_scales(job, pair);
  }
  // Asks for the scales of the next pair, which its bound() reads before anything else.
  static void fetch_scales(const PromptJob& job, int32_t pair) {
    const bool is_last = pair + 1 == job.num_pairs();
    if (Decoder::kScales < 0 || (is_last && job.next == nullptr)) {
      return;
    }
    for (int i = 0; i < 2; ++i) {
      const uint8_t* scales =
          (is_last ? job.next + i * job.w->band_bytes : job.band(pair + 1, i)) + Decoder::kScales;
      for (int32_t first = 0; first < job.w->cols; first += kTileCols) {
        prefetch<Decoder::kScaleLines>(scales);
        scales += tile_bytes(Decoder::kType);
      }
    }
  }
  Decoder decoder(const PromptJob& job, int which, int32_t tile) const {
    const uint8_t* tiles = bands[which] + band_header(job.w->type, job.w->cols);
    return Decoder(tiles + tile * tile_bytes(Decoder::kType), bands[which] + tile * 32,
                   job.blocks_of(tile), powers[which]);
  }
  void finish(const PromptJob& job, int32_t pair, const PromptScratch& scratch) const {
    const __m512 factors[2] = {powers[0].factor(Decoder::kExponent - kActExponent),
                               powers[1].factor(Decoder::kExponent - kActExponent)};
    store_sums(job, pair, scratch, factors);
  }
};

// Asks for rows.ahead, an equal part with each of `steps` steps.
struct RowsAhead {
  const uint8_t* at;
  const uint8_t* end;
  int64_t part;

  RowsAhead(const PromptRows& rows, int64_t steps)
      : at(rows.ahead),
        end(rows.ahead == nullptr ? nullptr : rows.ahead + rows.ahead_bytes),
        part((rows.ahead_bytes + 64 * steps - 1) / (64 * steps) * 64) {}
  KT_INLINE void fetch() {
    const uint8_t* to = end - at < part ? end : at + part;
    for (; at < to; at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }
  }
};

// What to ask for while a tile of `pair` is decoded: one kAhead bytes later, or as far into the
// next pair.
template <class Decoder>
inline const uint8_t* tile_ahead(const PromptJob& job, int32_t pair, int which, int32_t tile) {
  constexpr int64_t kStep = tile_bytes(Decoder::kType);
  constexpr auto kDistance = static_cast<int32_t>((kAhead + kStep / 2) / kStep);
  const int32_t tiles = job.num_tiles();
  const int32_t later = tile + (kDistance < tiles ? kDistance : tiles);
  if (later < tiles) {
    return job.band(pair, which) + later * kStep;
  }
  const int64_t offset = (later - tiles) * kStep;
  if (pair + 1 < job.num_pairs()) {
    return job.band(pair + 1, which) + offset;
  }
  return job.next == nullptr ? nullptr : job.next + which * job.w->band_bytes + offset;
}

// Up to 48 rows: sums stay in tiles.
template <class Decoder, int kTiles>
__attribute__((noinline)) void multiply_resident(const PromptJob& job, PromptScratch* scratch) {
  using Plan = TilePlan<kTiles>;
  constexpr int kStep = block_step(Decoder::kType);
  constexpr int kStepLines = (kStep + 63) / 64;
  const int32_t num_blocks = job.num_blocks();
  const int rows = (job.rows.m + kTiles - 1) / kTiles;
  const RowTiles row_tiles(job, scratch, 0, job.rows.m, kTiles, rows);
  Source<Decoder> sources[2];
  configure_tiles(rows, Plan::kConfigured);
  Plan::zero();
  RowsAhead rows_ahead(job.rows, int64_t{num_blocks} * job.num_pairs());
  uint32_t decoded = 0, used = 0;  // blocks so far
  int32_t used_block = 0, used_pair = 0;
  const auto line = [&](int band, uint32_t number) {
    return scratch->lines[0][band] + number % kRing * kBlockLines;
  };
  const auto step = [&] {
    return Step{row_tiles, job.rows.line_stride * used_block, line(0, used), line(1, used)};
  };
  const auto count_step = [&] {
    ++used;
    if (++used_block == num_blocks) {
      Plan::store(row_tiles);
      sources[used_pair % 2].finish(job, used_pair, *scratch);
      Plan::zero();
      used_block = 0;
      ++used_pair;
    }
  };
  for (int32_t pair = 0; pair < job.num_pairs(); ++pair) {
    Source<Decoder>& source = sources[pair % 2];
    source = Source<Decoder>(job, pair);
    for (int32_t tile = 0; tile < job.num_tiles(); ++tile) {
      const Decoder first = source.decoder(job, 0, tile), second = source.decoder(job, 1, tile);
      const uint8_t* const ahead[2] = {tile_ahead<Decoder>(job, pair, 0, tile),
                                       tile_ahead<Decoder>(job, pair, 1, tile)};
      const int nb = job.blocks_of(tile);
      for (int b = 0; b < nb; ++b, ++decoded) {
        if (ahead[0] != nullptr) {
          prefetch<kStepLines>(ahead[0] + b * kStep);
          prefetch<kStepLines>(ahead[1] + b * kStep);
        }
        rows_ahead.fetch();
        const Step now = step();
        const bool is_ready = decoded >= kLead;
        first.block(b, line(0, decoded), [&](int j) __attribute__((always_inline)) {
          if (is_ready) {
            finish_stores(scratch);
            j == 0   ? Plan::template portion<0>(now)
            : j == 1 ? Plan::template portion<1>(now)
            : j == 2 ? Plan::template portion<2>(now)
                     : Plan::template portion<3>(now);
          }
        });
        second.block(b, line(1, decoded), [&](int j) __attribute__((always_inline)) {
          if (is_ready) {
            finish_stores(scratch);
            j == 0   ? Plan::template portion<4>(now)
            : j == 1 ? Plan::template portion<5>(now)
            : j == 2 ? Plan::template portion<6>(now)
                     : Plan::template portion<7>(now);
          }
        });
        if (is_ready) {
          count_step();
        }
      }
    }
  }
  finish_stores(scratch);
  while (used < decoded) {
    run_step<Plan>(step());
    count_step();
  }
}

// Rows that take turns: passes of at most 32.
struct Passes {
  int32_t m, count;
  int rows;  // of a row tile

  explicit Passes(int32_t num_rows)
      : m(num_rows), count((m + 31) / 32), rows(((m + count - 1) / count + 1) / 2) {}
  int32_t first(int32_t pass) const { return pass * m / count; }
  RowTiles tiles(const PromptJob& job, PromptScratch* scratch, int32_t pass) const {
    return RowTiles(job, scratch, first(pass), first(pass + 1) - first(pass), 2, rows);
  }
};

// More rows: they take turns over the tile that has been decoded while the next one is.
template <class Decoder>
__attribute__((noinline)) void multiply_passes(const PromptJob& job, PromptScratch* scratch) {
  using Plan = PassPlan;
  constexpr int kStep = block_step(Decoder::kType);
  const Passes passes(job.rows.m);
  Source<Decoder> sources[2];
  configure_tiles(passes.rows, Plan::kConfigured);
  const int32_t num_tiles = job.num_tiles(), total = num_tiles * job.num_pairs();
  RowsAhead rows_ahead(job.rows, int64_t{job.num_blocks()} * job.num_pairs() * passes.count);
  // Tile `number` is multiplied while number + 1 is decoded.
  for (int32_t number = -1; number < total; ++number) {
    const int32_t pair = number < 0 ? -1 : number / num_tiles, tile = number - pair * num_tiles;
    const int32_t later = number + 1 < total ? number + 1 : number;
    const int32_t later_pair = later / num_tiles, later_tile = later % num_tiles;
    if (later_tile == 0 && later != number) {
      sources[later_pair % 2] = Source<Decoder>(job, later_pair);
    }
    const Source<Decoder>& source = sources[later_pair % 2];
    const Decoder decoders[2] = {source.decoder(job, 0, later_tile),
                                 source.decoder(job, 1, later_tile)};
    const uint8_t* const ahead[2] = {tile_ahead<Decoder>(job, later_pair, 0, later_tile),
                                     tile_ahead<Decoder>(job, later_pair, 1, later_tile)};
    uint8_t (*to)[8 * kBlockLines] = scratch->lines[later % 2];
    const int32_t wanted = later == number ? 0 : 2 * job.blocks_of(later_tile);
    int32_t done = 0;  // blocks of both bands in turn
    const auto decode = [&](const auto& between) __attribute__((always_inline)) {
      const int which = done % 2, b = done / 2;
      if (ahead[which] != nullptr) {
        prefetch<(kStep + 63) / 64>(ahead[which] + b * kStep);
      }
      decoders[which].block(b, to[which] + b * kBlockLines, between);
      ++done;
    };
    if (number < 0) {
      while (done < wanted) {
        decode([](int) {});
      }
      continue;
    }
    const int nb = job.blocks_of(tile);
    const int32_t steps = passes.count * nb;
    const uint8_t (*lines)[8 * kBlockLines] = scratch->lines[number % 2];
    int32_t due = 0;  // blocks that should be decoded by now, times `steps`
    finish_stores(scratch);
    for (int32_t pass = 0; pass < passes.count; ++pass) {
      const RowTiles row_tiles = passes.tiles(job, scratch, pass);
      if (tile == 0) {
        Plan::zero();
      } else {
        Plan::load(row_tiles);
      }
      for (int b = 0; b < nb; ++b) {
        const Step now = {row_tiles, job.rows.line_stride * (8 * tile + b),
                          lines[0] + b * kBlockLines, lines[1] + b * kBlockLines};
        rows_ahead.fetch();
        due += wanted;
        bool is_used = false;
        do {
          if (done * steps >= due) {
            run_step<Plan>(now);
            break;
          }
          const bool use = !is_used;
          decode([&](int j) __attribute__((always_inline)) {
            if (use) {
              finish_stores(scratch);
              j == 0   ? Plan::template portion<0>(now)
              : j == 1 ? Plan::template portion<2>(now)
              : j == 2 ? Plan::template portion<4>(now)
                       : Plan::template portion<6>(now);
            }
          });
          is_used = true;
        } while (done * steps < due);
      }
      Plan::store(row_tiles);
    }
    if (tile + 1 == num_tiles) {
      sources[pair % 2].finish(job, pair, *scratch);
    }
  }
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

// Types without a decoder of their own. decode(band, tile, out): one tile of a band.
template <class T, class Decode>
void multiply_converted(const PromptJob& job, PromptScratch* scratch, Decode decode) {
  using Plan = PassPlan;
  const Passes passes(job.rows.m);
  const __m512 factor = _mm512_scalef_ps(V::set_f(1.0f), V::set_f(-kActExponent));
  const __m512 factors[2] = {factor, factor};
  configure_tiles(passes.rows, Plan::kConfigured);
  for (int32_t pair = 0; pair < job.num_pairs(); ++pair) {
    for (int32_t tile = 0; tile < job.num_tiles(); ++tile) {
      uint8_t (*lines)[8 * kBlockLines] = scratch->lines[0];
      for (int which = 0; which < 2; ++which) {
        decode(job.band(pair, which), tile, &scratch->decoded);
        convert_tile<T>(scratch->decoded, 8, lines[which]);
      }
      finish_stores(scratch);
      for (int32_t pass = 0; pass < passes.count; ++pass) {
        const RowTiles row_tiles = passes.tiles(job, scratch, pass);
        if (tile == 0) {
          Plan::zero();
        } else {
          Plan::load(row_tiles);
        }
        for (int b = 0; b < 8; ++b) {
          run_step<Plan>({row_tiles, job.rows.line_stride * (8 * tile + b),
                          lines[0] + b * kBlockLines, lines[1] + b * kBlockLines});
        }
        Plan::store(row_tiles);
      }
    }
    store_sums(job, pair, *scratch, factors);
  }
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
  if (job.rows.m <= 16) {
    multiply_resident<Decoder, 1>(job, scratch);
  } else if (job.rows.m <= 32) {
    multiply_resident<Decoder, 2>(job, scratch);
  } else if (job.rows.m <= kResidentRows) {
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
                     const PromptRows& rows, float* out, int64_t out_stride, void* scratch,
                     const uint8_t* next) {
  multiply_type({&w, band_at(w, expert, band), num_bands, rows, out, out_stride, next},
                static_cast<PromptScratch*>(scratch));
  _tile_release();
}
