// formats_simd.inl: how each R16 format becomes lines of weights, scales and mins in registers, and
// in memory. Included by matrix_simd.inl, inside the anonymous namespace of an ISA file, after V.
//
// A format class decodes one tile for one half of its rows:
//   kGroup16   scales per 16 columns (else per 32)      kMin     has mins
//   kMax       largest stored weight value (unsigned)   kOffset  what was added to make it so
// pair(b, j, lo, hi): the weights of columns 32 b + 8 j .. +3 (lo) and +4 .. +7 (hi).
// scale(i) / min(i): i counts the tile's groups of 16 (kGroup16) or 32 columns.
// With kMax = 255 (8-bit weights) the lines are unsigned with offset 128 when V::kDotU8 (u8 x s8
// dot products do not saturate), plain signed otherwise.

// Weight lines are asked for twice, and into the L2 cache: a prefetch into L1 holds one of the few
// L1 miss buffers until DRAM answers, which caps a core at half its rate. Some of the far requests
// are lost (nothing tells); the near ones make up for that and cost nothing where all went well.
// A layer of Qwen3-30B's shape, Q4_K and Q6_K, 1 / 4 / 16 tokens, us, beside the same pattern read
// without arithmetic: 16 cores of a Xeon, 8 KiB alone 156 / 497 / 1254, 12 KiB and 4 KiB 123 / 408
// / 1136, pattern 126 / 416 / 1166; two Zen 4 cores 585 / 1922 / -, 464 / 1766 / -, 561 / 1918 / -.
// 1 .. 2 KiB for the near ones, 16 .. 24 KiB for the far ones: up to a tenth slower on both.
constexpr int kFar = 12288;
constexpr int kNear = 4096;
// The one distance of the kernels that work on tiles of bf16, and the bytes they ask for at a time.
constexpr int kAhead = 8192;
constexpr int block_step(int32_t type) { return static_cast<int>(tile_bytes(type) / 8); }

inline void prefetch_line(const uint8_t* p) {
  // gcc 12 drops the intrinsic from the loops of Q4_K and Q5_K.
  asm volatile("prefetcht1 %0" : : "m"(*p));
}

template <int kLines>
inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 16
  for (int i = 0; i < kLines; ++i) {
    prefetch_line(p + 64 * i);
  }
}

// What to ask for while a tile is used: its whole size from each place on.
struct Ahead {
  const uint8_t* far;
  const uint8_t* near;
};

// A tile's lines are asked for in 32 turns, four for every block, those behind the weights (scales,
// top bits) first: every block needs some of them from its start. A core of a Xeon has 16 buffers
// for what its L1 misses: asked for by the block, a layer took a fifth longer there.
template <int kTileBytes, int kTurn>
inline void prefetch_turn(const uint8_t* tile, int b) {
  constexpr int kEach = kTileBytes / 64 / 32, kRest = kTileBytes / 64 % 32;
  const int turn = 4 * b + kTurn;
  if (b < (kRest + 3 - kTurn) / 4) {  // turn < kRest
    prefetch_line(tile + 64 * (32 * kEach + turn));
  }
  prefetch<kEach>(tile + 64 * kEach * turn);
}

// kTurn of block b; far: nullptr = ask for nothing. Where arithmetic takes longer than memory (not
// kTwice), asking once, at the block's start, is enough, and leaves more registers.
template <class Format, bool kTwice, int kTurn>
inline void prefetch_ahead(const Ahead& ahead, int b) {
  if (Format::kTileBytes == 0 || (!kTwice && kTurn != 0) || ahead.far == nullptr) {
    return;
  }
  if constexpr (kTwice) {
    prefetch_turn<Format::kTileBytes, kTurn>(ahead.far, b);
    prefetch_turn<Format::kTileBytes, kTurn>(ahead.near, b);
  } else {
    constexpr int kEighth = Format::kTileBytes / 8;
    prefetch<(kEighth + 63) / 64>(ahead.far + b * kEighth);
  }
}

template <bool kGroup, bool kHasMin, int kLargest, int kAdded>
struct Traits {
  static constexpr bool kGroup16 = kGroup;
  static constexpr bool kMin = kHasMin;
  static constexpr int kMax = kLargest;
  static constexpr int kOffset = kAdded;
  static constexpr bool kPasses = V::kPasses;
};
using Unsigned2 = Traits<true, true, 3, 0>;
using Offset3 = Traits<true, false, 7, 4>;
using Unsigned4 = Traits<false, true, 15, 0>;
using Unsigned5 = Traits<false, true, 31, 0>;
using Offset4 = Traits<false, false, 15, 8>;
using Offset5 = Traits<false, false, 31, 16>;
using Offset6 = Traits<true, false, 63, 32>;
using Signed8 = Traits<false, false, 255, 128>;
using Block8 = Traits<true, false, 255, 128>;  // GGUF blocks as decode_block gives them

inline void split_nibbles(const uint8_t* line, V::I* lo, V::I* hi) {
  const V::I x = V::load(line);
  const V::I mask = V::set8(15);
  *lo = V::and_(x, mask);
  *hi = V::and_(V::srl16<4>(x), mask);
}

// Puts bit p (0..7) of every byte of `bits` at bit kTo of `low`.
template <int kTo, int kP>
inline V::I add_bit(V::I low, V::I bits) {
  if constexpr (kP < kTo) {
    return V::or_masked(low, V::sll16<kTo - kP>(bits), V::set8(1 << kTo));
  } else {
    return V::or_masked(low, V::srl16<kP - kTo>(bits), V::set8(1 << kTo));
  }
}

template <int kJ>
inline void add_top_bits(V::I bits, V::I* lo, V::I* hi) {
  *lo = add_bit<4, 2 * kJ>(*lo, bits);
  *hi = add_bit<4, 2 * kJ + 1>(*hi, bits);
}

// A 16-entry table in every 128-bit lane.
inline V::I table(const int8_t* values, int add) {
  alignas(16) int8_t bytes[16];
  for (int i = 0; i < 16; ++i) {
    bytes[i] = static_cast<int8_t>(values[i] + add);
  }
  return V::repeat128(bytes);
}

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct Q8_0 : Signed8 {
  static constexpr int kTileBytes = tile_bytes(kQ8_0);
  const uint8_t* tile;
  const uint8_t* d;
  Q8_0(const uint8_t* at, const uint8_t*, int nb, int half)
      : tile(at + half * 32), d(at + nb * 512 + half * 16) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    const uint8_t* line = tile + b * 512 + kJ * 128;
    *lo = V::load(line);
    *hi = V::load(line + 64);
    if constexpr (V::kDotU8) {
      *lo = V::xor_(*lo, V::set8(-128));
      *hi = V::xor_(*hi, V::set8(-128));
    }
  }
  V::F scale(int b) const { return V::halves(d + b * 32); }
  V::F min(int) const { return V::zero(); }
};

// Q4_0, Q4_1 and the tables that replace their linear values.
template <class T, int kD>
struct Nibbles : T {
  const uint8_t* tile;
  const uint8_t* d;
  int blocks;
  Nibbles(const uint8_t* at, const uint8_t*, int nb, int half)
      : tile(at + half * 32), d(at + nb * kD + half * 16), blocks(nb) {}
  V::F scale(int b) const { return V::halves(d + b * 32); }
  V::F min(int b) const { return V::mul(V::halves(d + blocks * 32 + b * 32), V::set_f(-1.0f)); }
};

template <class T, int32_t kType>
struct Q4 : Nibbles<T, 256> {
  static constexpr int kTileBytes = tile_bytes(kType);
  using Nibbles<T, 256>::Nibbles;
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(this->tile + b * 256 + kJ * 64, lo, hi);
  }
};
using Q4_0 = Q4<Offset4, kQ4_0>;
using Q4_1 = Q4<Unsigned4, kQ4_1>;

template <class T, int32_t kType>
struct Q5 : Nibbles<T, 320> {
  static constexpr int kTileBytes = tile_bytes(kType);
  const uint8_t* top;
  Q5(const uint8_t* at, const uint8_t* halves, int nb, int half)
      : Nibbles<T, 320>(at, halves, nb, half), top(at + nb * 256 + half * 32) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(this->tile + b * 256 + kJ * 64, lo, hi);
    add_top_bits<kJ>(V::load(top + b * 64), lo, hi);
  }
};
using Q5_0 = Q5<Offset5, kQ5_0>;
using Q5_1 = Q5<Unsigned5, kQ5_1>;

struct IQ4_NL : Nibbles<Signed8, 256> {
  static constexpr int kTileBytes = tile_bytes(kIQ4_NL);
  V::I values;
  IQ4_NL(const uint8_t* at, const uint8_t* halves, int nb, int half)
      : Nibbles(at, halves, nb, half), values(table(kIq4Values, V::kDotU8 ? 128 : 0)) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(tile + b * 256 + kJ * 64, lo, hi);
    *lo = V::shuffle(values, *lo);
    *hi = V::shuffle(values, *hi);
  }
};

struct IQ4_XS : Signed8 {
  static constexpr int kTileBytes = tile_bytes(kIQ4_XS);
  const uint8_t* tile;
  const uint8_t* low;
  const uint8_t* high;
  V::F d;
  V::I values;
  IQ4_XS(const uint8_t* at, const uint8_t*, int, int half)
      : tile(at + half * 32),
        low(at + 2048 + half * 8),
        high(at + 2144 + half * 16),
        d(V::halves(at + 2112 + half * 16)),
        values(table(kIq4Values, V::kDotU8 ? 128 : 0)) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(tile + b * 256 + kJ * 64, lo, hi);
    *lo = V::shuffle(values, *lo);
    *hi = V::shuffle(values, *hi);
  }
  V::F scale(int b) const {
    const V::I bits = V::and_(V::srl32(V::widen_u8(low + b / 2 * 16), 4 * (b & 1)), V::set32(15));
    const V::I top = V::and_(V::srl32(V::widen_u16(high), 2 * b), V::set32(3));
    const V::I value = V::sub32(V::or_(bits, V::sll32(top, 4)), V::set32(32));
    return V::mul(d, V::to_float(value));
  }
  V::F min(int) const { return V::zero(); }
};

struct MXFP4 : Offset5 {                  // values -12..12 stored as 4..28
  static constexpr bool kPasses = false;  // with the table and 8 rows the registers do not suffice
  static constexpr int kTileBytes = tile_bytes(kMXFP4);
  const uint8_t* tile;
  const uint8_t* e;
  V::I values;
  MXFP4(const uint8_t* at, const uint8_t*, int nb, int half)
      : tile(at + half * 32), e(at + nb * 256 + half * 8), values(table(kMxfp4Values, 16)) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(tile + b * 256 + kJ * 64, lo, hi);
    *lo = V::shuffle(values, *lo);
    *hi = V::shuffle(values, *hi);
  }
  V::F scale(int b) const { return V::e8m0_half(V::widen_u8(e + b * 16)); }
  V::F min(int) const { return V::zero(); }
};

// The 6-bit scales and mins of Q4_K and Q5_K, 12 planes of 16 rows, as one byte each:
// scales of blocks 0..7, then mins.
struct KScales {
  alignas(64) uint8_t value[16][16];
  V::F d, dmin;
  KScales(const uint8_t* planes, int half)
      : d(V::halves(planes + 192 + half * 16)), dmin(V::halves(planes + 224 + half * 16)) {
    const V::I six = V::set8(63), four = V::set8(15), top = V::set8(0x30);
    for (int i = 0; i < 64; i += V::kBytes) {  // four planes at a time
      const V::I a = V::load(planes + i);
      const V::I b = V::load(planes + 64 + i);
      const V::I c = V::load(planes + 128 + i);
      V::store(&value[0][0] + i, V::and_(a, six));
      V::store(&value[4][0] + i, V::or_masked(V::and_(c, four), V::srl16<2>(a), top));
      V::store(&value[8][0] + i, V::and_(b, six));
      V::store(&value[12][0] + i, V::or_masked(V::and_(V::srl16<4>(c), four), V::srl16<2>(b), top));
    }
    shift = half * 8;
  }
  V::F scale(int b) const { return V::mul(d, V::to_float(V::widen_u8(&value[b][shift]))); }
  V::F min(int b) const { return V::mul(dmin, V::to_float(V::widen_u8(&value[8 + b][shift]))); }
  int shift;
};

struct Q4_K : Unsigned4 {
  static constexpr int kTileBytes = tile_bytes(kQ4_K);
  const uint8_t* tile;
  KScales scales;
  Q4_K(const uint8_t* at, const uint8_t*, int, int half)
      : tile(at + half * 32), scales(at + 2048, half) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(tile + b * 256 + kJ * 64, lo, hi);
  }
  V::F scale(int b) const { return scales.scale(b); }
  V::F min(int b) const { return scales.min(b); }
};

struct Q5_K : Unsigned5 {
  static constexpr int kTileBytes = tile_bytes(kQ5_K);
  const uint8_t* tile;
  KScales scales;
  Q5_K(const uint8_t* at, const uint8_t*, int, int half)
      : tile(at + half * 32), scales(at + 2560, half) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(tile + b * 256 + kJ * 64, lo, hi);
    const uint8_t* bits = tile + 2048 + b * 64;
    add_top_bits<kJ>(V::load(bits), lo, hi);
  }
  V::F scale(int b) const { return scales.scale(b); }
  V::F min(int b) const { return scales.min(b); }
};

// Pairs of bits of 8 columns from a line of 16; kJ as in pair().
template <int kJ>
inline void split_pairs(const uint8_t* line, V::I* lo, V::I* hi) {
  const V::I bits = V::load(line);
  const V::I mask = V::set8(3);
  constexpr int kShift = kJ % 2 * 4;
  if constexpr (kShift == 0) {
    *lo = V::and_(bits, mask);
  } else {
    *lo = V::and_(V::srl16<kShift>(bits), mask);
  }
  *hi = V::and_(V::srl16<kShift + 2>(bits), mask);
}

struct Q2_K : Unsigned2 {
  static constexpr int kTileBytes = tile_bytes(kQ2_K);
  const uint8_t* tile;
  const uint8_t* bytes;
  V::F d, dmin;
  Q2_K(const uint8_t* at, const uint8_t*, int, int half)
      : tile(at + half * 32),
        bytes(at + 1024 + half * 8),
        d(V::halves(at + 1280 + half * 16)),
        dmin(V::halves(at + 1312 + half * 16)) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_pairs<kJ>(tile + b * 128 + kJ / 2 * 64, lo, hi);
  }
  V::F scale(int i) const {
    return V::mul(d, V::to_float(V::and_(V::widen_u8(bytes + i * 16), V::set32(15))));
  }
  V::F min(int i) const {
    return V::mul(dmin, V::to_float(V::srl32(V::widen_u8(bytes + i * 16), 4)));
  }
};

struct Q3_K : Offset3 {
  static constexpr int kTileBytes = tile_bytes(kQ3_K);
  alignas(64) uint8_t value[16][16];  // scales as int8
  const uint8_t* tile;
  V::F d;
  int shift;
  Q3_K(const uint8_t* at, const uint8_t* halves, int, int half)
      : tile(at + half * 32), d(V::halves(halves + half * 16)), shift(half * 8) {
    const uint8_t* planes = at + 1536;
    const V::I four = V::set8(15), top = V::set8(0x30), offset = V::set8(32);
    for (int i = 0; i < 64; i += V::kBytes) {  // four planes at a time
      const V::I a = V::load(planes + i);
      const V::I b = V::load(planes + 64 + i);
      const V::I c = V::load(planes + 128 + i);
      const V::I low[4] = {V::and_(a, four), V::and_(b, four), V::and_(V::srl16<4>(a), four),
                           V::and_(V::srl16<4>(b), four)};
      const V::I high[4] = {V::sll16<4>(c), V::sll16<2>(c), c, V::srl16<2>(c)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        V::store(&value[4 * j][0] + i, V::sub8(V::or_masked(low[j], high[j], top), offset));
      }
    }
  }
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_pairs<kJ>(tile + b * 128 + kJ / 2 * 64, lo, hi);
    const V::I bits = V::load(tile + 1024 + b * 64);
    *lo = add_bit<2, 2 * kJ>(*lo, bits);
    *hi = add_bit<2, 2 * kJ + 1>(*hi, bits);
  }
  V::F scale(int i) const { return V::mul(d, V::to_float(V::widen_s8(&value[i][shift]))); }
  V::F min(int) const { return V::zero(); }
};

struct Q6_K : Offset6 {
  static constexpr int kTileBytes = tile_bytes(kQ6_K);
  const uint8_t* tile;
  const uint8_t* bytes;
  V::F d;
  Q6_K(const uint8_t* at, const uint8_t* halves, int, int half)
      : tile(at + half * 32), bytes(at + 3072 + half * 8), d(V::halves(halves + half * 16)) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    split_nibbles(tile + b * 256 + kJ * 64, lo, hi);
    const uint8_t* line = tile + 2048 + b * 128 + kJ / 2 * 64;
    const V::I bits = V::load(line);
    const V::I mask = V::set8(0x30);
    if constexpr (kJ % 2 == 0) {
      *lo = V::or_masked(*lo, V::sll16<4>(bits), mask);
      *hi = V::or_masked(*hi, V::sll16<2>(bits), mask);
    } else {
      *lo = V::or_masked(*lo, bits, mask);
      *hi = V::or_masked(*hi, V::srl16<2>(bits), mask);
    }
  }
  V::F scale(int i) const { return V::mul(d, V::to_float(V::widen_s8(bytes + i * 16))); }
  V::F min(int) const { return V::zero(); }
};

// A tile decoded to memory: the source for more than V::kMaxM rows of formats without kPasses, and
// the only one for types without their own class.
struct alignas(64) DecodedTile {
  uint8_t lines[64][64];  // as pair() gives them
  float scale[16][16];    // [group][row]
  float min[16][16];
};

// Decodes a tile of a type kept as GGUF blocks, none of which has mins. blocks: room for 16.
void decode_gguf_tile(int32_t type, int32_t block_bytes, const uint8_t* at, const uint8_t* ahead,
                      DecodedBlock* blocks, DecodedTile* tile) {
  for (int r = 0; r < kBandRows; ++r) {
    if (ahead != nullptr) {
      prefetch<2>(ahead + r * block_bytes);
    }
    decode_block(type, at + r * block_bytes, blocks + r);
  }
  const V::I flip = V::kDotU8 ? V::set8(-128) : V::zero_i();
  for (int half = 0; half < 16 / V::kRows; ++half) {
    const DecodedBlock* rows = blocks + half * V::kRows;
    for (int g = 0; g < 64; g += V::kRows) {
      V::transpose(rows->q + 4 * g, sizeof(DecodedBlock), flip, &tile->lines[g][half * 32]);
    }
    for (int g = 0; g < 16; g += V::kRows) {
      V::transpose(rows->scale + g, sizeof(DecodedBlock), V::zero_i(), &tile->scale[g][half * 8]);
    }
  }
}

template <class T>
struct FromMemory : T {
  static constexpr int kTileBytes = 0;  // already in L1
  const uint8_t* lines;
  const float* scales;
  const float* mins;
  FromMemory(const DecodedTile& tile, int half)
      : lines(&tile.lines[0][0] + half * 32),
        scales(&tile.scale[0][0] + half * 8),
        mins(&tile.min[0][0] + half * 8) {}
  template <int kJ>
  void pair(int b, V::I* lo, V::I* hi) const {
    *lo = V::load(lines + b * 512 + kJ * 128);
    *hi = V::load(lines + b * 512 + kJ * 128 + 64);
  }
  V::F scale(int i) const { return V::load_f(scales + i * 16); }
  V::F min(int i) const { return V::load_f(mins + i * 16); }
};

inline void store_pair(uint8_t* lines, V::I lo, V::I hi) {
  V::store(lines, lo);
  V::store(lines + 64, hi);
}

template <class Format>
void decode_pairs(const Format& format, int b, uint8_t* lines) {
  V::I lo, hi;
  format.template pair<0>(b, &lo, &hi);
  store_pair(lines, lo, hi);
  format.template pair<1>(b, &lo, &hi);
  store_pair(lines + 128, lo, hi);
  format.template pair<2>(b, &lo, &hi);
  store_pair(lines + 256, lo, hi);
  format.template pair<3>(b, &lo, &hi);
  store_pair(lines + 384, lo, hi);
}

// ahead: what to prefetch meanwhile, as many bytes as the tile has; or nullptr.
template <class Format>
void decode_to_memory(const uint8_t* at, const uint8_t* halves, int nb, DecodedTile* tile,
                      const uint8_t* ahead) {
  for (int half = 0; half < 16 / V::kRows; ++half) {
    const Format format(at, halves, nb, half);
    constexpr int kPerBlock = Format::kGroup16 ? 2 : 1;
    for (int b = 0; b < nb; ++b) {
      prefetch_ahead<Format, false, 0>({half == 0 ? ahead : nullptr, nullptr}, b);
      decode_pairs<Format>(format, b, &tile->lines[8 * b][0] + half * 32);
      for (int i = b * kPerBlock; i < (b + 1) * kPerBlock; ++i) {
        V::store_f(&tile->scale[i][half * 8], format.scale(i));
        if constexpr (Format::kMin) {
          V::store_f(&tile->min[i][half * 8], format.min(i));
        }
      }
    }
  }
}
