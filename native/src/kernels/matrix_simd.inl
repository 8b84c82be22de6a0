// matrix_simd.inl: the matrix kernels of every SIMD ISA, written over leaf operations V.
//
// Included once by each matrix_<isa>.cpp, inside its anonymous namespace, after V is defined.
// V works on V::kRows output rows at once (lanes = rows): 16 with 512-bit registers, 8 with
// 256-bit ones, which pass over each tile twice ("half" 0 and 1) while it is in the L1 cache.
//
// Arithmetic of one 32-block and one activation row, the same for every m and every ISA:
//   dot    = exact integer sum of q_w * q_x (per 16 columns for types with 16-column scales)
//   total  = fma(float(dot), scale_w * scale_x, total)                     32-column scales
//   total  = fma(fma(float(dot1), s1, float(dot0) * s0), scale_x, total)   16-column scales
//   total  = fma(-min_w, sum_x, total)                                     types with a min
// Up to V::kMaxM activation rows stay in registers and the weights are decoded in registers too;
// for more rows this is repeated, or a tile is decoded once to L1 and reused (Format::kPasses).

// ---- activations ----

// Scalar tail of prepare: everything but the 32 products of a block.
inline void store_block_meta(uint8_t* dst, const ActLayout& at, int32_t b, float scale, int32_t s0,
                             int32_t s1) {
  const float fields[2] = {scale, scale * static_cast<float>(s0 + s1)};
  const int32_t off32[2] = {-32 * s0, -32 * s1};
  const int32_t off128 = -128 * (s0 + s1);
  const float sum16[2] = {scale * static_cast<float>(s0), scale * static_cast<float>(s1)};
  __builtin_memcpy(dst + at.scale + 4 * b, &fields[0], 4);
  __builtin_memcpy(dst + at.sum + 4 * b, &fields[1], 4);
  __builtin_memcpy(dst + at.off128 + 4 * b, &off128, 4);
  __builtin_memcpy(dst + at.off32 + 8 * b, off32, 8);
  __builtin_memcpy(dst + at.sum16 + 8 * b, sum16, 8);
}

void prepare_q8(const float* x, int32_t cols, int32_t first, int32_t count, uint8_t* dst) {
  const ActLayout at = act_layout(cols);
  alignas(64) float padded[32];
  for (int32_t start = 0; start < count; start += 32) {
    const float* from = x + start;
    if (count - start < 32) {
      __builtin_memset(padded, 0, sizeof(padded));
      __builtin_memcpy(padded, from, static_cast<size_t>(count - start) * 4);
      from = padded;
    }
    const int32_t b = (first + start) / 32;
    const float largest = V::max_abs32(from);  // NaN when any input is NaN
    const float inverse = largest == 0.0f ? 0.0f : 127.0f / largest;
    int32_t sums[2];
    V::quantize32(from, inverse, reinterpret_cast<int8_t*>(dst) + 32 * b, sums);
    store_block_meta(dst, at, b, largest / 127.0f, sums[0], sums[1]);
  }
}

void prepare(ActKind kind, const float* x, int32_t cols, int32_t first, int32_t count,
             uint8_t* dst) {
  if (kind == kActQ8) {
    prepare_q8(x, cols, first, count, dst);
    return;
  }
  __builtin_memcpy(dst + 4 * static_cast<int64_t>(first), x, static_cast<size_t>(count) * 4);
  if (first + count == cols) {
    const int64_t used = 4 * static_cast<int64_t>(cols);
    __builtin_memset(dst + used, 0, static_cast<size_t>(align_up(used, 64) - used));
  }
}

#include "kernels/formats_simd.inl"

// ---- integer dot products ----

// Integer sums of M rows over a run of lines; without a u8 dot instruction products are first
// summed in 16 bits as far as they fit.
template <class T, int M>
struct Dots {
  static constexpr bool kNative = V::kDotU8;
  static constexpr int kLines = T::kGroup16 ? 4 : 8;
  static constexpr int kFit = T::kMax == 255 ? 1 : 32767 / (2 * 127 * T::kMax);
  static constexpr int kRun = kFit < kLines ? kFit : kLines;
  V::I sum[M];
  V::I part[kNative ? 1 : M];

  // off: start value addresses; each is an int32 of the activation row.
  void start(const uint8_t* const* x, int64_t off) {
    constexpr bool kStartsAtZero = T::kOffset == 0 || (T::kMax == 255 && !kNative);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      if constexpr (kStartsAtZero) {
        sum[i] = V::zero_i();
      } else if constexpr (T::kGroup16 && T::kOffset == 128) {
        sum[i] = V::sll32(V::repeat32(x[i] + off), 2);  // off32 -> off128
      } else if constexpr (T::kGroup16 && T::kOffset == 4) {
        sum[i] = V::sra32<3>(V::repeat32(x[i] + off));  // off32 -> off4
      } else if constexpr (T::kGroup16 || T::kOffset == 128) {
        sum[i] = V::repeat32(x[i] + off);
      } else {
        sum[i] = V::sra32<T::kOffset == 8 ? 4 : 3>(V::repeat32(x[i] + off));  // off128 -> 8, 16
      }
    }
  }
  // kIndex: how many lines of this run of columns came before.
  template <int kIndex>
  void add(const uint8_t* const* x, int64_t at, V::I weights) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const V::I values = V::repeat32(x[i] + at);
      if constexpr (kNative) {
        sum[i] = V::dot_u8(sum[i], weights, values);
      } else {
        const V::I products =
            T::kMax == 255 ? V::dot16_s8(weights, values) : V::dot16_u8(weights, values);
        if constexpr (kRun == 1) {
          sum[i] = V::add32(sum[i], V::pairs32(products));
        } else {
          part[i] = kIndex % kRun == 0 ? products : V::add16(part[i], products);
          if constexpr (kIndex % kRun == kRun - 1) {
            sum[i] = V::add32(sum[i], V::pairs32(part[i]));
          }
        }
      }
    }
  }
};

// Adds nb blocks (first: their index in the row) to the totals of M rows.
template <int M, class Format>
inline __attribute__((always_inline)) void add_tile(const Format& w, int nb, int64_t first,
                                                    const uint8_t* const* x, const ActLayout& at,
                                                    Ahead ahead, V::F* total) {
  for (int b = 0; b < nb; ++b) {
    const int64_t q = 32 * (first + b);
    const int64_t meta = 4 * (first + b);
    Dots<Format, M> dots;
    V::I lo, hi;
    if constexpr (Format::kGroup16) {
      V::F part[M];
      dots.start(x, at.off32 + 2 * meta);
      prefetch_ahead<Format, M <= 4, 0>(ahead, b);
      w.template pair<0>(b, &lo, &hi);
      dots.template add<0>(x, q, lo);
      dots.template add<1>(x, q + 4, hi);
      prefetch_ahead<Format, M <= 4, 1>(ahead, b);
      w.template pair<1>(b, &lo, &hi);
      dots.template add<2>(x, q + 8, lo);
      dots.template add<3>(x, q + 12, hi);
      V::F scale = w.scale(2 * b);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        part[i] = V::mul(V::to_float(dots.sum[i]), scale);
      }
      dots.start(x, at.off32 + 2 * meta + 4);
      prefetch_ahead<Format, M <= 4, 2>(ahead, b);
      w.template pair<2>(b, &lo, &hi);
      dots.template add<0>(x, q + 16, lo);
      dots.template add<1>(x, q + 20, hi);
      prefetch_ahead<Format, M <= 4, 3>(ahead, b);
      w.template pair<3>(b, &lo, &hi);
      dots.template add<2>(x, q + 24, lo);
      dots.template add<3>(x, q + 28, hi);
      scale = w.scale(2 * b + 1);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        part[i] = V::fma(V::to_float(dots.sum[i]), scale, part[i]);
        total[i] = V::fma(part[i], V::repeat_f(x[i] + at.scale + meta), total[i]);
      }
      if constexpr (Format::kMin) {
        const V::F min0 = w.min(2 * b), min1 = w.min(2 * b + 1);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          total[i] = V::fnma(min0, V::repeat_f(x[i] + at.sum16 + 2 * meta), total[i]);
          total[i] = V::fnma(min1, V::repeat_f(x[i] + at.sum16 + 2 * meta + 4), total[i]);
        }
      }
    } else {
      dots.start(x, at.off128 + meta);
      prefetch_ahead<Format, M <= 4, 0>(ahead, b);
      w.template pair<0>(b, &lo, &hi);
      dots.template add<0>(x, q, lo);
      dots.template add<1>(x, q + 4, hi);
      prefetch_ahead<Format, M <= 4, 1>(ahead, b);
      w.template pair<1>(b, &lo, &hi);
      dots.template add<2>(x, q + 8, lo);
      dots.template add<3>(x, q + 12, hi);
      prefetch_ahead<Format, M <= 4, 2>(ahead, b);
      w.template pair<2>(b, &lo, &hi);
      dots.template add<4>(x, q + 16, lo);
      dots.template add<5>(x, q + 20, hi);
      prefetch_ahead<Format, M <= 4, 3>(ahead, b);
      w.template pair<3>(b, &lo, &hi);
      dots.template add<6>(x, q + 24, lo);
      dots.template add<7>(x, q + 28, hi);
      const V::F scale = w.scale(b);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        total[i] = V::fma(V::to_float(dots.sum[i]),
                          V::mul(scale, V::repeat_f(x[i] + at.scale + meta)), total[i]);
      }
      if constexpr (Format::kMin) {
        const V::F min = w.min(b);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          total[i] = V::fnma(min, V::repeat_f(x[i] + at.sum + meta), total[i]);
        }
      }
    }
  }
}

// ---- one band ----

#include "kernels/band_job.inl"

template <class Format, int M>
__attribute__((noinline)) void few_rows(const BandJob& job, int32_t first) {
  const ActLayout at = act_layout(job.w->cols);
  constexpr int64_t step = Format::kTileBytes;
  const uint8_t* tiles = job.band + band_header(job.w->type, job.w->cols);
  const uint8_t* x[M];
  gather_rows<M>(job, first, M, x);
  V::F total[16 / V::kRows][M];
  for (int half = 0; half < 16 / V::kRows; ++half) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      total[half][i] = V::zero();
    }
  }
  for (int32_t tile = 0; tile < job.num_tiles(); ++tile) {
    for (int half = 0; half < 16 / V::kRows; ++half) {
      const int nb = job.tile_blocks(tile);
      const Format format(tiles + tile * step, job.band + tile * 32, nb, half);
      // The band is in the caches when its second half or further rows are multiplied.
      const bool fresh = half == 0 && first == 0;
      add_tile<M>(format, nb, 8 * tile, x, at,
                  fresh ? job.ahead(tiles, tile, step) : Ahead{nullptr, nullptr}, total[half]);
    }
  }
  for (int half = 0; half < 16 / V::kRows; ++half) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      V::store_f(job.out + (first + i) * job.out_stride + half * 8, total[half][i]);
    }
  }
}

// Calls body(integral constant M) for M = count, 1 <= count <= kMost.
template <int M>
struct Count {
  static constexpr int kValue = M;
};
template <int kMost, class Body>
inline __attribute__((always_inline)) void with_count(int32_t count, Body&& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) {
      return with_count<kMost - 1>(count, body);
    }
  }
  body(Count<kMost>{});
}

// Calls body(Count<M>, first row) for all rows of a job in groups of at most kMost and of nearly
// equal size: a group of one row costs half as much as one of four.
template <int kMost, class Body>
inline __attribute__((always_inline)) void for_groups(int32_t num_rows, Body&& body) {
  int32_t groups = (num_rows + kMost - 1) / kMost;
  for (int32_t first = 0; first < num_rows; --groups) {
    const int32_t count = (num_rows - first + groups - 1) / groups;
    with_count<kMost>(count, [&](auto m) { body(m, first); });
    first += count;
  }
}

// Adds one decoded tile to M rows from `first` on; totals live in `out`.
template <class T, int M>
__attribute__((noinline)) void add_decoded(const BandJob& job, const DecodedTile& decoded,
                                           int32_t tile, int32_t first) {
  const ActLayout at = act_layout(job.w->cols);
  const uint8_t* x[M];
  gather_rows<M>(job, first, M, x);
  for (int half = 0; half < 16 / V::kRows; ++half) {
    const FromMemory<T> format(decoded, half);
    float* out = job.out + first * job.out_stride + half * 8;
    V::F total[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      total[i] = tile == 0 ? V::zero() : V::load_f(out + i * job.out_stride);
    }
    add_tile<M>(format, job.tile_blocks(tile), 8 * tile, x, at, {nullptr, nullptr}, total);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      V::store_f(out + i * job.out_stride, total[i]);
    }
  }
}

template <class T>
void add_decoded_rows(const BandJob& job, const DecodedTile& decoded, int32_t tile) {
  for_groups<V::kMaxM>(job.m, [&](auto m, int32_t first) {
    add_decoded<T, decltype(m)::kValue>(job, decoded, tile, first);
  });
}

template <class Format, class T>
void multiply_format(const BandJob& job) {
  if (Format::kPasses || job.m <= V::kMaxM) {
    for_groups<V::kMaxM>(
        job.m, [&](auto m, int32_t first) { few_rows<Format, decltype(m)::kValue>(job, first); });
    return;
  }
  if constexpr (!Format::kPasses) {
    auto* decoded = static_cast<DecodedTile*>(job.scratch);
    constexpr int64_t step = Format::kTileBytes;
    const uint8_t* tiles = job.band + band_header(job.w->type, job.w->cols);
    for (int32_t tile = 0; tile < job.num_tiles(); ++tile) {
      decode_to_memory<Format>(tiles + tile * step, job.band + tile * 32, job.tile_blocks(tile),
                               decoded, job.ahead(tiles, tile, step).far);
      add_decoded_rows<T>(job, *decoded, tile);
    }
  }
}

// Types kept as GGUF blocks: all rows through a decoded tile.
void multiply_gguf(const BandJob& job) {
  const int32_t block_bytes = type_traits(job.w->type)->block_bytes;
  const int64_t step = kBandRows * block_bytes;
  auto* decoded = static_cast<DecodedTile*>(job.scratch);
  auto* blocks = reinterpret_cast<DecodedBlock*>(decoded + 1);
  for (int32_t tile = 0; tile < job.num_tiles(); ++tile) {
    decode_gguf_tile(job.w->type, block_bytes, job.band + tile * step,
                     job.ahead(job.band, tile, step).far, blocks, decoded);
    add_decoded_rows<Block8>(job, *decoded, tile);
  }
}

// ---- F32, F16, BF16 ----
// Two chains of fused multiply-adds, even and odd columns, added at the end.

struct PairsF32 {
  static constexpr bool kGroup16 = false;
  static constexpr int kBytes = 128;  // of two columns
  static void load(const uint8_t* p, V::F* even, V::F* odd) {
    *even = V::load_f(reinterpret_cast<const float*>(p));
    *odd = V::load_f(reinterpret_cast<const float*>(p + 64));
  }
  static V::F last(const uint8_t* p) { return V::load_f(reinterpret_cast<const float*>(p)); }
  static constexpr int kHalf = 32;
};
struct PairsF16 {
  static constexpr bool kGroup16 = false;
  static constexpr int kBytes = 64;
  static void load(const uint8_t* p, V::F* even, V::F* odd) {
    *even = V::halves(p);
    *odd = V::halves(p + 32);
  }
  static V::F last(const uint8_t* p) { return V::halves(p); }
  static constexpr int kHalf = 16;
};
struct PairsBF16 {
  static constexpr bool kGroup16 = false;
  static constexpr int kBytes = 64;
  static void load(const uint8_t* p, V::F* even, V::F* odd) {
    const V::I x = V::load(p);
    *even = V::as_float(V::sll32(x, 16));
    *odd = V::as_float(V::and_(x, V::set32(static_cast<int>(0xffff0000u))));
  }
  static V::F last(const uint8_t* p) { return V::as_float(V::sll32(V::load(p), 16)); }
  static constexpr int kHalf = 32;
};

// Two columns at a time, columns k / 4 .. end / 4 from p on.
template <class Pairs, int M>
inline __attribute__((always_inline)) const uint8_t* add_pairs(const uint8_t* p, int64_t k,
                                                               int64_t end, const uint8_t* const* x,
                                                               Ahead ahead, V::F* even, V::F* odd) {
#pragma GCC unroll 2
  for (; k < end; k += 8, p += Pairs::kBytes) {
    V::F w0, w1;
    if (ahead.far != nullptr) {
      prefetch<Pairs::kBytes / 64>(ahead.far);
      prefetch<Pairs::kBytes / 64>(ahead.near);
      ahead.far += Pairs::kBytes;
      ahead.near += Pairs::kBytes;
    }
    Pairs::load(p, &w0, &w1);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      even[i] = V::fma(w0, V::repeat_f(x[i] + k), even[i]);
      odd[i] = V::fma(w1, V::repeat_f(x[i] + k + 4), odd[i]);
    }
  }
  return p;
}

// `distance` pairs of columns behind `pair`, in this band or the next; this one where nothing is
// known to follow.
template <class Pairs>
inline const uint8_t* float_pairs_behind(const BandJob& job, int64_t pair, int64_t distance) {
  const int64_t num_pairs = job.w->cols / 2;
  if (pair + distance < num_pairs) {
    return job.band + (pair + distance) * Pairs::kBytes;
  }
  return job.next == nullptr ? job.band + pair * Pairs::kBytes
                             : job.next + (pair + distance - num_pairs) * Pairs::kBytes;
}

template <class Pairs, int M>
__attribute__((noinline)) void float_rows(const BandJob& job, int32_t first) {
  const uint8_t* x[M];
  gather_rows<M>(job, first, M, x);
  const int64_t num_pairs = job.w->cols / 2;
  const int64_t far = kFar / Pairs::kBytes < num_pairs ? kFar / Pairs::kBytes : num_pairs;
  const int64_t near = kNear / Pairs::kBytes < num_pairs ? kNear / Pairs::kBytes : num_pairs;
  for (int half = 0; half < 16 / V::kRows; ++half) {
    const uint8_t* p = job.band + half * Pairs::kHalf;
    V::F even[M], odd[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      even[i] = odd[i] = V::zero();
    }
    // The band is in the caches when its second half or further rows are multiplied.
    const bool fresh = half == 0 && first == 0;
    const int64_t ends[3] = {num_pairs - far, num_pairs - near, num_pairs};
    int64_t pair = 0;
    for (const int64_t end : ends) {
      const Ahead ahead = {float_pairs_behind<Pairs>(job, pair, far),
                           float_pairs_behind<Pairs>(job, pair, near)};
      p = add_pairs<Pairs, M>(p, 8 * pair, 8 * end, x, fresh ? ahead : Ahead{nullptr, nullptr},
                              even, odd);
      pair = end;
    }
    if ((job.w->cols & 1) != 0) {
      const V::F w0 = Pairs::last(p);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        even[i] = V::fma(w0, V::repeat_f(x[i] + 8 * num_pairs), even[i]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      V::store_f(job.out + (first + i) * job.out_stride + half * 8, V::add(even[i], odd[i]));
    }
  }
}

template <class Pairs>
void multiply_float(const BandJob& job) {
  for_groups<V::kMaxFloatM>(
      job.m, [&](auto m, int32_t first) { float_rows<Pairs, decltype(m)::kValue>(job, first); });
}

void multiply_job(const BandJob& job) {
  switch (job.w->type) {
    case kF32:
      return multiply_float<PairsF32>(job);
    case kF16:
      return multiply_float<PairsF16>(job);
    case kBF16:
      return multiply_float<PairsBF16>(job);
    case kQ4_0:
      return multiply_format<Q4_0, Offset4>(job);
    case kQ4_1:
      return multiply_format<Q4_1, Unsigned4>(job);
    case kQ5_0:
      return multiply_format<Q5_0, Offset5>(job);
    case kQ5_1:
      return multiply_format<Q5_1, Unsigned5>(job);
    case kQ8_0:
      return multiply_format<Q8_0, Signed8>(job);
    case kQ2_K:
      return multiply_format<Q2_K, Unsigned2>(job);
    case kQ3_K:
      return multiply_format<Q3_K, Offset3>(job);
    case kQ4_K:
      return multiply_format<Q4_K, Unsigned4>(job);
    case kQ5_K:
      return multiply_format<Q5_K, Unsigned5>(job);
    case kQ6_K:
      return multiply_format<Q6_K, Offset6>(job);
    case kIQ4_NL:
      return multiply_format<IQ4_NL, Signed8>(job);
    case kIQ4_XS:
      return multiply_format<IQ4_XS, Signed8>(job);
    case kMXFP4:
      return multiply_format<MXFP4, Offset5>(job);
    default:
      return multiply_gguf(job);
  }
}

void multiply_band(const Matrix& w, int32_t expert, int32_t band, const uint8_t* acts,
                   int64_t act_stride, const int32_t* rows, int32_t m, float* out,
                   int64_t out_stride, void* scratch, const uint8_t* next) {
  multiply_job(
      {&w, band_at(w, expert, band), acts, act_stride, rows, m, out, out_stride, scratch, next});
}

// ---- peak rate ----

// 12 chains hide the latency of any multiply-add with two units; the barriers keep the compiler
// from moving the work out of the loop.
template <class Register, class Step>
int64_t chains(int64_t rounds, Register start, Register operand, Step step) {
  constexpr int kChains = 12;
  Register sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) {
    sum[i] = start;
  }
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      asm volatile("" : "+v"(operand));
      sum[i] = step(sum[i], operand);
      asm volatile("" : "+v"(sum[i]));
    }
  }
  return rounds * kChains;
}

int64_t peak(int32_t kind, int64_t rounds) {
  if (kind == 0) {
    return 4 * V::kRows * chains(rounds, V::zero_i(), V::set8(3), [](V::I sum, V::I x) {
             if constexpr (V::kDotU8) {
               return V::dot_u8(sum, x, x);
             } else {
               return V::add32(sum, V::pairs32(V::dot16_u8(x, x)));
             }
           });
  }
#if KT_HAS_BF16
  if (kind == 1) {
    return 2 * V::kRows * chains(rounds, V::zero(), V::set_f(0.5f), [](V::F sum, V::F x) {
             const auto pairs = reinterpret_cast<__m512bh>(x);
             return _mm512_dpbf16_ps(sum, pairs, pairs);
           });
  }
#endif
  if (kind != 2) {
    return 0;
  }
  return V::kRows * chains(rounds, V::zero(), V::set_f(0.5f),
                           [](V::F sum, V::F x) { return V::fma(x, x, sum); });
}
