// The vector kernels, written once over a 16-lane Vec. Included inside the anonymous namespace of
// each vector_<isa>.cpp, which defines Vec and its operations first; nothing here may be emitted as
// a weak symbol, so there are only static functions and local templates.

// Loops over tiles: -O2 leaves short constant loops rolled and their accumulators in memory.
#define KT_UNROLL _Pragma("GCC unroll 16")

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return static_cast<uint16_t>((bits >> 16) | 0x40);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);  // nearest even
}

// e^x with about one unit in the last place; exactly 1 at 0, exactly 0 below -87.3.
inline Vec exp_lanes(Vec x) {
  const Vec low = set1(-87.33f);
  const Vec clamped = max(min(x, set1(88.0f)), low);
  const Vec n = round_even(mul(clamped, set1(1.44269504f)));
  // x - n ln2 in two steps: the first product is exact.
  Vec r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return select_less(x, low, set1(0.0f), scale2(p, n));
}

static void rms_norm(const float* x, const float* weight, int32_t n, float eps, float* out) {
  Vec sum[4] = {set1(0), set1(0), set1(0), set1(0)};
  int32_t i = 0;
  for (; i + 64 <= n; i += 64) {
    KT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + 16 * j);
      sum[j] = fma(v, v, sum[j]);
    }
  }
  for (; i < n; i += 16) {
    const Vec v = load_part(x + i, n - i, 0.0f);
    sum[0] = fma(v, v, sum[0]);
  }
  const float total = reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  const float mean = total / static_cast<float>(n) + eps;
  const Vec scale = set1(1.0f / __builtin_sqrtf(mean));
  for (i = 0; i + 16 <= n; i += 16) {
    store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  }
  if (i < n) {
    const Vec v = mul(load_part(x + i, n - i, 0.0f), scale);
    store_part(out + i, mul(v, load_part(weight + i, n - i, 0.0f)), n - i);
  }
}

inline Vec silu_mul_lanes(Vec gate, Vec up) {
  const Vec one = set1(1.0f);
  const Vec e = exp_lanes(sub(set1(0.0f), gate));
  return mul(div(gate, add(one, e)), up);
}

static void silu_mul(const float* gate, const float* up, int32_t n, float* out) {
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) {
    store(out + i, silu_mul_lanes(load(gate + i), load(up + i)));
  }
  if (i < n) {
    const Vec v = silu_mul_lanes(load_part(gate + i, n - i, 0), load_part(up + i, n - i, 0));
    store_part(out + i, v, n - i);
  }
}

static void add_scaled(const float* a, float factor, const float* b, int32_t n, float* out) {
  const Vec f = set1(factor);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) {
    store(out + i, fma(f, load(b + i), load(a + i)));
  }
  if (i < n) {
    const Vec v = fma(f, load_part(b + i, n - i, 0), load_part(a + i, n - i, 0));
    store_part(out + i, v, n - i);
  }
}

static void add_band(float* to, int64_t stride, const int32_t* rows, const float* factors,
                     const float* sums, int64_t sums_stride, int32_t m, int32_t n) {
  for (int32_t i = 0; i < m; ++i) {
    float* row = to + rows[i] * stride;
    const Vec factor = set1(factors[i]);
    const Vec sum = load(sums + i * sums_stride);
    if (n == kLanes) {
      store(row, fma(factor, sum, load(row)));
    } else {
      store_part(row, fma(factor, sum, load_part(row, n, 0.0f)), n);
    }
  }
}

static void scale(float* x, float factor, int32_t n) {
  const Vec f = set1(factor);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) {
    store(x + i, mul(load(x + i), f));
  }
  if (i < n) {
    store_part(x + i, mul(load_part(x + i, n - i, 0), f), n - i);
  }
}

static void rope(float* x, const float* cos, const float* sin, int32_t half, int32_t neox) {
  if (neox == 0) {
    for (int32_t i = 0; i < half; ++i) {
      const float a = x[2 * i];
      const float b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = a * sin[i] + b * cos[i];
    }
    return;
  }
  int32_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const Vec a = load(x + i);
    const Vec b = load(x + half + i);
    const Vec c = load(cos + i);
    const Vec s = load(sin + i);
    store(x + i, sub(mul(a, c), mul(b, s)));
    store(x + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i];
    const float b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

// One accumulator per (row, input) pair whatever the tile, so a result does not depend on m.
template <int R, int M>
static void dot_tile(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int32_t n,
                     float* out, int64_t out_stride) {
  Vec sum[R][M];
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    KT_UNROLL
    for (int i = 0; i < M; ++i) {
      sum[r][i] = set1(0.0f);
    }
  }
  int32_t c = 0;
  for (; c + 16 <= n; c += 16) {
    Vec wide[R];
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      wide[r] = load(w + r * w_stride + c);
    }
    KT_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec input = load(x + i * x_stride + c);
      KT_UNROLL
      for (int r = 0; r < R; ++r) {
        sum[r][i] = fma(wide[r], input, sum[r][i]);
      }
    }
  }
  if (c < n) {
    KT_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec input = load_part(x + i * x_stride + c, n - c, 0.0f);
      KT_UNROLL
      for (int r = 0; r < R; ++r) {
        sum[r][i] = fma(load_part(w + r * w_stride + c, n - c, 0.0f), input, sum[r][i]);
      }
    }
  }
  KT_UNROLL
  for (int i = 0; i < M; ++i) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      out[i * out_stride + r] = reduce_add(sum[r][i]);
    }
  }
}

static void dot_rows(const float* w, int64_t w_stride, int32_t num_rows, const float* x,
                     int64_t x_stride, int32_t m, int32_t n, float* out, int64_t out_stride) {
  for (int32_t i = 0; i < m;) {
    const int32_t count = kManyRegisters && m - i >= 4 ? 4 : 1;
    const float* input = x + i * x_stride;
    float* to = out + i * out_stride;
    int32_t r = 0;
    for (; r + 4 <= num_rows; r += 4) {
      if (count == 4) {
        dot_tile<4, 4>(w + r * w_stride, w_stride, input, x_stride, n, to + r, out_stride);
      } else {
        dot_tile<4, 1>(w + r * w_stride, w_stride, input, x_stride, n, to + r, out_stride);
      }
    }
    for (; r < num_rows; ++r) {
      if (count == 4) {
        dot_tile<1, 4>(w + r * w_stride, w_stride, input, x_stride, n, to + r, out_stride);
      } else {
        dot_tile<1, 1>(w + r * w_stride, w_stride, input, x_stride, n, to + r, out_stride);
      }
    }
    i += count;
  }
}

static int32_t argmax(const float* x, int32_t n, float* max_out) {
  const float lowest = -__builtin_inff();
  // max(v, best) returns best when v is NaN.
  Vec best = set1(lowest);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) {
    best = max(load(x + i), best);
  }
  if (i < n) {
    best = max(load_part(x + i, n - i, lowest), best);
  }
  const float value = reduce_max(best);
  *max_out = value;
  const Vec wanted = set1(value);
  for (i = 0; i + 16 <= n; i += 16) {
    const uint32_t mask = equal_mask(load(x + i), wanted);
    if (mask != 0) {
      return i + __builtin_ctz(mask);
    }
  }
  for (; i < n; ++i) {
    if (x[i] == value) {
      return i;
    }
  }
  return 0;  // nothing but NaN
}

static double sum_exp(const float* x, int32_t n, float max_value, float factor, float* out) {
  const Vec top = set1(max_value);
  const Vec f = set1(factor);
  double total = 0.0;
  int32_t i = 0;
  while (i < n) {
    // Lanes are added in f32 for a short run and in f64 across runs: no loss over a vocabulary.
    Vec sum = set1(0.0f);
    const int32_t end = n - i > 1024 ? i + 1024 : n;
    for (; i + 16 <= end; i += 16) {
      const Vec e = exp_lanes(mul(sub(load(x + i), top), f));
      if (out != nullptr) {
        store(out + i, e);
      }
      sum = add(sum, e);
    }
    if (i < end) {
      const Vec part = exp_lanes(mul(sub(load_part(x + i, end - i, max_value), top), f));
      if (out != nullptr) {
        store_part(out + i, part, end - i);
      }
      sum = add(sum, keep_first(part, end - i, set1(0.0f)));
      i = end;
    }
    total += static_cast<double>(reduce_add(sum));
  }
  return total;
}

static void softmax(float* x, int32_t n) {
  float top = 0.0f;
  argmax(x, n, &top);
  const double total = sum_exp(x, n, top, 1.0f, x);
  scale(x, static_cast<float>(1.0 / total), n);
}

static void store_k(int32_t kv_type, const float* k, int32_t head_dim, int32_t lane, void* group) {
  if (kv_type == KT_KV_F32) {
    auto* to = static_cast<float*>(group) + lane;
    for (int32_t d = 0; d < head_dim; ++d) {
      to[d * kLanes] = k[d];
    }
    return;
  }
  auto* to = static_cast<uint16_t*>(group) + lane;
  for (int32_t d = 0; d < head_dim; ++d) {
    to[d * kLanes] = kv_type == KT_KV_F16 ? float_to_half(k[d]) : float_to_bf16(k[d]);
  }
}

static void store_v(int32_t kv_type, const float* v, int32_t head_dim, int32_t padded_dim,
                    void* row) {
  for (int32_t d = 0; d < padded_dim; ++d) {
    const float value = d < head_dim ? v[d] : 0.0f;
    if (kv_type == KT_KV_F32) {
      static_cast<float*>(row)[d] = value;
    } else {
      static_cast<uint16_t*>(row)[d] =
          kv_type == KT_KV_F16 ? float_to_half(value) : float_to_bf16(value);
    }
  }
}

// KV element types: how 16 stored values become floats.
struct KvF32 {
  using Stored = float;
  static inline __attribute__((always_inline)) Vec widen(const float* p) { return load(p); }
};
struct KvF16 {
  using Stored = uint16_t;
  static inline __attribute__((always_inline)) Vec widen(const uint16_t* p) { return load_f16(p); }
};
struct KvBf16 {
  using Stored = uint16_t;
  static inline __attribute__((always_inline)) Vec widen(const uint16_t* p) { return load_bf16(p); }
};

// scores[i][g * 16 + lane] = q[i] . k for M query rows and G groups.
template <class Kv, int M, int G>
static void score_tile(const AttendBlock& b, int32_t row, int32_t group) {
  const int32_t dim = b.head_dim;
  const float* q = b.q + static_cast<int64_t>(row) * dim;
  Vec sum[M][G];
  KT_UNROLL
  for (int i = 0; i < M; ++i) {
    KT_UNROLL
    for (int g = 0; g < G; ++g) {
      sum[i][g] = set1(0.0f);
    }
  }
  const typename Kv::Stored* k[G];
  KT_UNROLL
  for (int g = 0; g < G; ++g) {
    k[g] = static_cast<const typename Kv::Stored*>(b.k[group + g]);
  }
  for (int32_t d = 0; d < dim; ++d) {
    Vec key[G];
    KT_UNROLL
    for (int g = 0; g < G; ++g) {
      key[g] = Kv::widen(k[g] + d * kLanes);
    }
    KT_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec value = set1(q[i * dim + d]);
      KT_UNROLL
      for (int g = 0; g < G; ++g) {
        sum[i][g] = fma(value, key[g], sum[i][g]);
      }
    }
  }
  KT_UNROLL
  for (int i = 0; i < M; ++i) {
    KT_UNROLL
    for (int g = 0; g < G; ++g) {
      store(b.scores + static_cast<int64_t>(row + i) * kBlockPositions + (group + g) * kLanes,
            sum[i][g]);
    }
  }
}

// M rows against all groups, as many groups at a time as the registers hold accumulators.
template <class Kv, int M>
static void score_groups(const AttendBlock& b, int32_t row, int32_t groups) {
  int32_t g = 0;
  if (kManyRegisters) {
    for (; g + 2 <= groups; g += 2) {
      score_tile<Kv, M, 2>(b, row, g);
    }
  }
  for (; g < groups; ++g) {
    score_tile<Kv, M, 1>(b, row, g);
  }
}

template <class Kv>
static void score_rows(const AttendBlock& b) {
  const int32_t groups = (b.num_positions + kLanes - 1) / kLanes;
  int32_t row = 0;
  if (kManyRegisters) {
    for (; row + 8 <= b.m; row += 8) {
      score_groups<Kv, 8>(b, row, groups);
    }
  }
  for (; row + 4 <= b.m; row += 4) {
    score_groups<Kv, 4>(b, row, groups);
  }
  for (; row < b.m; ++row) {
    if (groups == 4) {
      score_tile<Kv, 1, 4>(b, row, 0);
    } else {
      for (int32_t g = 0; g < groups; ++g) {
        score_tile<Kv, 1, 1>(b, row, g);
      }
    }
  }
}

// Turns a row's scores into exp(score - new maximum) and rescales what was summed before.
inline void soften_row(const AttendBlock& b, int32_t row) {
  const Vec lowest = set1(-__builtin_inff());
  const Vec zero = set1(0.0f);
  float* s = b.scores + static_cast<int64_t>(row) * kBlockPositions;
  const int32_t seen = b.limits[row] < b.num_positions ? b.limits[row] : b.num_positions;
  if (seen <= 0) {  // nothing visible: this block leaves the row's state exactly as it was
    KT_UNROLL
    for (int g = 0; g < kBlockGroups; ++g) {
      store(s + g * kLanes, zero);
    }
    return;
  }
  Vec score[kBlockGroups];
  Vec top = lowest;
  KT_UNROLL
  for (int g = 0; g < kBlockGroups; ++g) {
    score[g] =
        seen > g * kLanes ? keep_first(load(s + g * kLanes), seen - g * kLanes, lowest) : lowest;
    top = max(score[g], top);
  }
  const float before = b.max[row];
  const float block_max = reduce_max(top);
  const float now = block_max > before ? block_max : before;
  const Vec base = set1(now);
  Vec sum = zero;
  KT_UNROLL
  for (int g = 0; g < kBlockGroups; ++g) {
    const Vec p = exp_lanes(sub(score[g], base));
    store(s + g * kLanes, p);
    sum = add(sum, p);
  }
  b.max[row] = now;
  const float added = reduce_add(sum);
  if (now == before) {
    b.sum[row] += added;
    return;
  }
  float factor[kLanes];
  store(factor, exp_lanes(set1(before - now)));  // 0 for the first block, where before is -inf
  b.sum[row] = b.sum[row] * factor[0] + added;
  scale(b.acc + static_cast<int64_t>(row) * b.padded_dim, factor[0], b.padded_dim);
}

// acc[i] += sum over positions of p[i] * v, positions in order: N registers of columns, M rows.
template <class Kv, int M, int N>
static void value_tile(const AttendBlock& b, int32_t row, int32_t col) {
  Vec sum[M][N];
  float* acc = b.acc + static_cast<int64_t>(row) * b.padded_dim + col;
  const float* p = b.scores + static_cast<int64_t>(row) * kBlockPositions;
  KT_UNROLL
  for (int i = 0; i < M; ++i) {
    KT_UNROLL
    for (int j = 0; j < N; ++j) {
      sum[i][j] = load(acc + i * b.padded_dim + j * kLanes);
    }
  }
  for (int32_t pos = 0; pos < b.num_positions; ++pos) {
    const auto* v = static_cast<const typename Kv::Stored*>(b.v[pos / kLanes]) +
                    static_cast<int64_t>(pos % kLanes) * b.padded_dim + col;
    Vec value[N];
    KT_UNROLL
    for (int j = 0; j < N; ++j) {
      value[j] = Kv::widen(v + j * kLanes);
    }
    KT_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec weight = set1(p[i * kBlockPositions + pos]);
      KT_UNROLL
      for (int j = 0; j < N; ++j) {
        sum[i][j] = fma(weight, value[j], sum[i][j]);
      }
    }
  }
  KT_UNROLL
  for (int i = 0; i < M; ++i) {
    KT_UNROLL
    for (int j = 0; j < N; ++j) {
      store(acc + i * b.padded_dim + j * kLanes, sum[i][j]);
    }
  }
}

template <class Kv, int M>
static void value_columns(const AttendBlock& b, int32_t row) {
  int32_t col = 0;
  if (kManyRegisters) {
    for (; col + 4 * kLanes <= b.padded_dim; col += 4 * kLanes) {
      value_tile<Kv, M, 4>(b, row, col);
    }
  }
  for (; col < b.padded_dim; col += kLanes) {
    value_tile<Kv, M, 1>(b, row, col);
  }
}

template <class Kv>
static void attend_rows(const AttendBlock& b) {
  score_rows<Kv>(b);
  for (int32_t row = 0; row < b.m; ++row) {
    soften_row(b, row);
  }
  int32_t row = 0;
  for (; row + 4 <= b.m; row += 4) {
    value_columns<Kv, 4>(b, row);
  }
  for (; row < b.m; ++row) {
    value_columns<Kv, 1>(b, row);
  }
}

static void attend(const AttendBlock& block) {
  if (block.kv_type == KT_KV_F32) {
    attend_rows<KvF32>(block);
  } else if (block.kv_type == KT_KV_F16) {
    attend_rows<KvF16>(block);
  } else {
    attend_rows<KvBf16>(block);
  }
}

static void merge(float* max_value, float* sum, float* acc, float part_max, float part_sum,
                  const float* part_acc, int32_t n) {
  if (part_sum == 0.0f) {
    return;  // the row saw nothing of this segment
  }
  const float top = part_max > *max_value ? part_max : *max_value;
  float old_factor[kLanes];
  float new_factor[kLanes];
  store(old_factor, exp_lanes(set1(*max_value - top)));
  store(new_factor, exp_lanes(set1(part_max - top)));
  *max_value = top;
  *sum = *sum * old_factor[0] + part_sum * new_factor[0];
  const Vec keep = set1(old_factor[0]);
  const Vec gain = set1(new_factor[0]);
  for (int32_t i = 0; i < n; i += kLanes) {
    store(acc + i, fma(gain, load(part_acc + i), mul(keep, load(acc + i))));
  }
}

constexpr VectorKernels kTable = {
    KT_VECTOR_ISA, rms_norm, silu_mul, add_scaled, add_band, scale,  rope,    dot_rows,
    softmax,       store_k,  store_v,  attend,     merge,    argmax, sum_exp,
};

#undef KT_UNROLL
