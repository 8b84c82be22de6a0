// linear.cu: quantised matrix times few rows on the GPU, straight from R16 bands.
//
// The bands are the bytes the CPU kernels use (native/src/kernels/layout.h), so an expert moves
// between CPU and GPU without conversion. Compiled at start-up by NVRTC after formats.cu.
//
// Mapping: `split` warps share R bands (16 output rows each) and take their tiles of 256 columns,
// copied to shared memory a few tiles ahead. A tile's 32-column blocks meet one or two groups of
// eight rows of activations in integer matrix instructions, which read them once for R bands.
// Integer dots of a block are exact; the f32 part of a block is
//     sum += scale_x * (s * dot)
// and after each tile sum -= dm * (m * sum_x of its blocks). Tiles are added in an order that
// depends on the matrix alone: a band has `parts` sums, part v of tiles v, v + parts, ..., block
// after block; then the parts in turn. A row's result is therefore the same whatever runs beside
// it.

constexpr int kThreads = 256;
constexpr int kMaxThreads = 512;

// How the host cut a launch (engine/cuda/gemv.py). Dynamic shared memory: the sums of `sums` bands,
// part_floats for each part; then for each warp `stages` (1 .. 4) stages of stage_bytes for each of
// the bands that it computes at once.
struct Cut {
  int parts, split;  // split divides parts, parts <= tiles
  int stages, stage_bytes, part_floats, sums;
};
constexpr int kColumn = 20;  // floats from one row of activations to the next: keeps banks apart

// Sums of part v of a block's band b: at column * kColumn + row.
__device__ __forceinline__ float* part_of(const Cut& cut, int b, int v) {
  return reinterpret_cast<float*>(shared_memory) + (b * cut.parts + v) * cut.part_floats;
}
template <int R>
__device__ __forceinline__ u8* stages_of(const Cut& cut, int warp) {
  return shared_memory + cut.parts * cut.part_floats * 4 * cut.sums +
         warp * cut.stages * R * cut.stage_bytes;
}
// A value of a band, its parts added in turn.
__device__ __forceinline__ float sum_parts(const Cut& cut, int b, int column, int r) {
  float sum = 0.0f;
  for (int v = 0; v < cut.parts; ++v) {
    sum += part_of(cut, b, v)[column * kColumn + r];
  }
  return sum;
}

// Quantised activations [M, cols] in groups of eight rows and 32-column blocks, so that a lane
// finds all blocks of its rows at constant distances.
constexpr int kGroup = 8;  // rows
constexpr int kMeta = 2 * kGroup;
struct Acts {
  i8* q;        // [M / 8, cols / 32, 8, 32]
  float* meta;  // [M / 8, cols / 32, 2, 8]: scale and scale * sum of q
  int blocks;   // cols / 32
};

// The place of block b of a row's group, in blocks of a group.
__device__ __forceinline__ i64 place_of(int row, int blocks, int b) {
  return (i64)(row / kGroup) * blocks + b;
}

// Where a lane's share of a group of rows begins.
struct GroupRows {
  const i8* q;
  const float* scale[2];
  const float* sum;
};

// row(i): the activation row of the group's row i.
template <typename Row>
__device__ __forceinline__ GroupRows group_rows(const Acts& x, Row row) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int own = row(g), first = row(2 * t), second = row(2 * t + 1);
  GroupRows out;
  out.q = x.q + (place_of(own, x.blocks, 0) * kGroup + own % kGroup) * 32 + 8 * t;
  out.scale[0] = x.meta + place_of(first, x.blocks, 0) * kMeta + first % kGroup;
  out.scale[1] = x.meta + place_of(second, x.blocks, 0) * kMeta + second % kGroup;
  out.sum = x.meta + place_of(own, x.blocks, 0) * kMeta + kGroup + own % kGroup;
  return out;
}

// The same, from block b on.
__device__ __forceinline__ GroupRows rows_from(const GroupRows& rows, int b) {
  return {rows.q + b * kGroup * 32,
          {rows.scale[0] + b * kMeta, rows.scale[1] + b * kMeta},
          rows.sum + b * kMeta};
}

// What a lane reads of a group's activations for one block.
struct Inputs {
  uint2 q;
  float scale[2];
};

// kLive of the two rows to scale exist; kPacked: they lie side by side.
template <int kLive, bool kPacked>
__device__ __forceinline__ Inputs load_inputs(const GroupRows& rows, int b) {
  Inputs out;
  out.q = __ldg(reinterpret_cast<const uint2*>(rows.q + b * kGroup * 32));
  if (kLive == 2 && kPacked) {
    const float2 both = __ldg(reinterpret_cast<const float2*>(rows.scale[0] + b * kMeta));
    out.scale[0] = both.x;
    out.scale[1] = both.y;
  } else {
#pragma unroll
    for (int i = 0; i < kLive; ++i) {
      out.scale[i] = __ldg(rows.scale[i] + b * kMeta);
    }
  }
  return out;
}

// Sums start as the bits of kMagic: an integer of less than 23 bits counts the last bits of a
// float's mantissa. A weight's scale has at most 19 bits, so that kMagic times it is exact, and
// w * (float - kMagic) takes one instruction and rounds once.
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;
// What multiply_floats takes of a number.
constexpr u32 kElevenBits = 0xffffe000;

// Adds the products of block j of a unit with T groups of rows.
template <int kType, int T, int kLive>
__device__ __forceinline__ void add_products(const Unit<kType>& unit, const Scales<kType>& mine,
                                             int j, const Inputs (&x)[T], float (&sum)[T][4]) {
  const int lane = threadIdx.x & 31, t = lane & 3;
  constexpr int kHalves = kType == kQ6_K ? 2 : 1;
  u32 a[4];
  decode_block<kType>(unit, j, t, a);
  float s[2][kHalves], zero[2][kHalves];
  factors_from<kType>(mine, (lane & ~3) | j, s);
#pragma unroll
  for (int n = 0; n < 2 * kHalves; ++n) {
    zero[n & 1][n >> 1] = __fmul_rn(-kMagic, s[n & 1][n >> 1]);
  }
#pragma unroll
  for (int i = 0; i < T; ++i) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {  // Q6_K: of 16 columns, which two of four lanes hold
      const bool is_there = kHalves == 1 || (t < 2) == (h == 0);
      const int start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
      int dot[4];
      multiply_tile(dot, a, is_there ? x[i].q : make_uint2(0, 0), start);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if ((n & 1) < kLive) {
          const float product = __fmaf_rn(__int_as_float(dot[n]), s[n >> 1][h], zero[n >> 1][h]);
          sum[i][n] = __fmaf_rn(product, x[i].scale[n & 1], sum[i][n]);
        }
      }
    }
  }
}

// Subtracts a tile's minima times the sums of its nb blocks, where rows begin. m, dm: of the lane's
// blocks t and 4 + t.
template <int T, int kLive>
__device__ __forceinline__ void subtract_minima(const float (&m)[4], const float (&dm)[2],
                                                const GroupRows (&rows)[T], int nb,
                                                float (&sum)[T][4]) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < T; ++i) {
    const float first = __ldg(rows[i].sum + min(t, nb - 1) * kMeta);
    const float second = __ldg(rows[i].sum + min(4 + t, nb - 1) * kMeta);
    const float2 high = make_float2(__uint_as_float(__float_as_uint(first) & kElevenBits),
                                    __uint_as_float(__float_as_uint(second) & kElevenBits));
    const float2 low = make_float2(first - high.x, second - high.y);
    float product[4] = {};
    multiply_floats(product, m, high, product);
    multiply_floats(product, m, low, product);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if ((n & 1) < kLive) {
        sum[i][n] = __fmaf_rn(-dm[n >> 1], product[n], sum[i][n]);
      }
    }
  }
}

// Bands first, first + step, ... of a matrix: R from each of them on. Where a run of R is longer
// than what is left of the matrix, the last band is computed again.
struct Bands {
  const u8* data;
  i64 band_bytes;
  int first, step, end;
};

// The tiles of a warp in turn: in each run of bands those of part v, v + split, ...
struct TileOrder {
  int band, v, tile;

  __device__ __forceinline__ void advance(const Cut& cut, int tiles, int first, int step) {
    tile += cut.parts;
    if (tile >= tiles) {
      v += cut.split;
      if (v >= cut.parts) {
        v = first;
        band += step;
      }
      tile = v;
    }
  }
};

// Leaves a part's sums of T groups of rows in part[column * kColumn + row] and clears them.
template <int T, int kLive>
__device__ __forceinline__ void store_part(float (&sum)[T][4], float* part) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < T; ++i) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if ((n & 1) < kLive && (kLive == 2 || t == 0)) {
        part[(i * kGroup + 2 * t + (n & 1)) * kColumn + 2 * g + (n >> 1)] = sum[i][n];
      }
      sum[i][n] = 0.0f;
    }
  }
}

// Dot products of a warp's parts first, first + split, ... of runs of R bands with T groups of
// rows. put(n, v): where part v of a run's band n belongs; done(band) after all parts of a run.
// kLive: 1 if there is one row alone. waits: the activations come from the kernel before, the
// weights do not.
template <int kType, int R, int T, int kLive, bool kPacked, typename Put, typename Done>
__device__ __forceinline__ void dot_tiles(const Bands& bands, int cols, const GroupRows (&rows)[T],
                                          int first, const Cut& cut, u8* stages, bool waits,
                                          Put put, Done done) {
  const int tiles = (cols + 255) / 256;
  constexpr bool kEarly = R * T == 1;  // few enough registers for a tile's inputs
  TileOrder ahead = {bands.first, first, first}, now = ahead;
  const auto copy_ahead = [&](u8* stage) {
    if (ahead.band < bands.end) {
#pragma unroll
      for (int n = 0; n < R; ++n) {
        const u8* band = bands.data + min(ahead.band + n, bands.end - 1) * bands.band_bytes;
        copy_tile<kType>(stage + n * cut.stage_bytes, band, cols, ahead.tile);
      }
      ahead.advance(cut, tiles, first, bands.step);
    }
    end_copies();
  };
  for (int d = 0; d < cut.stages; ++d) {
    copy_ahead(stages + d * R * cut.stage_bytes);
  }
  if (waits) {
    wait_for_previous();
  }
  float sum[R][T][4] = {};
  u8* stage = stages;
  while (now.band < bands.end) {
    const int nb = blocks_of_tile<kType>(cols, now.tile);
    GroupRows here[T];
#pragma unroll
    for (int i = 0; i < T; ++i) {
      here[i] = rows_from(rows[i], now.tile * 8);
    }
    const auto load = [&](int s, Inputs(&to)[T]) {
#pragma unroll
      for (int i = 0; i < T; ++i) {
        to[i] = load_inputs<kLive, kPacked>(here[i], has_whole_tiles<kType>() ? s : min(s, nb - 1));
      }
    };
    Inputs early[kEarly ? 8 : 1][T];
    if (kEarly) {
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        load(s, early[kEarly ? s : 0]);
      }
    }
    float m[R][4] = {}, dm[R][2];
    wait_for_copies(cut.stages - 1);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!has_whole_tiles<kType>() && half * kUnitBlocks >= nb) {
        break;
      }
      Unit<kType> unit[R];
      Scales<kType> mine[R];
#pragma unroll
      for (int n = 0; n < R; ++n) {
        const u8* tile = stage + n * cut.stage_bytes;
        load_unit<kType, true>(tile, tile + tile_bytes<kType>(), nb, half, unit[n]);
        mine[n] = scales_of<kType>(unit[n], nb, half);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          m[n][2 * half + r] = mine[n].m[r];
          dm[n][r] = mine[n].dm[r];
        }
      }
#pragma unroll
      for (int j = 0; j < kUnitBlocks; ++j) {
        const int s = half * kUnitBlocks + j;
        Inputs inputs[T];
        if (!kEarly) {
          load(s, inputs);
        }
#pragma unroll
        for (int n = 0; n < R; ++n) {
          add_products<kType, T, kLive>(unit[n], mine[n], j,
                                        kEarly ? early[kEarly ? s : 0] : inputs, sum[n]);
        }
      }
    }
    if constexpr (has_min<kType>()) {
#pragma unroll
      for (int n = 0; n < R; ++n) {
        subtract_minima<T, kLive>(m[n], dm[n], here, nb, sum[n]);
      }
    }
    __syncwarp();
    copy_ahead(stage);
    stage += R * cut.stage_bytes;
    if (stage == stages + cut.stages * R * cut.stage_bytes) {
      stage = stages;
    }
    const int v = now.v, band = now.band;
    now.advance(cut, tiles, first, bands.step);
    if (now.v != v || now.band != band) {
#pragma unroll
      for (int n = 0; n < R; ++n) {
        store_part<T, kLive>(sum[n], put(n, v));
      }
      if (now.band != band) {
        done(band);
      }
    }
  }
}

template <int R, int T, int kLive, bool kPacked, typename Put, typename Done>
__device__ __forceinline__ void dot_any(int type, const Bands& bands, int cols,
                                        const GroupRows (&rows)[T], int first, const Cut& cut,
                                        u8* stages, bool waits, Put put, Done done) {
  switch (type) {
#define KT_CASE(t)                                                                               \
  case t:                                                                                        \
    return dot_tiles<t, R, T, kLive, kPacked>(bands, cols, rows, first, cut, stages, waits, put, \
                                              done);
    KT_TYPES(KT_CASE)
#undef KT_CASE
  }
}

// Up to three matrices with the same input in one launch (q, k, v); unused ones have no bands.
struct Outputs {
  Matrix w[3];
  float* out[3];          // [M, rows]
  const float* bias[3];   // [rows] or null
  const float* residual;  // [M, rows] added to out[0], or null
};

// M <= 8 T rows. A block computes runs of R bands, blockIdx.x, blockIdx.x + gridDim.x, ... of all
// matrices, and asks for a run's weights while it is busy with the ones before. A run's sums lie in
// other places than the last one's, so that it may begin while these are read.
template <int R, int T, int kLive>
__device__ __forceinline__ void multiply(const Outputs& p, const Acts& acts, int M,
                                         const Cut& cut) {
  release_next();
  const int warp = threadIdx.x >> 5, grid = gridDim.x;
  GroupRows rows[T];  // those beyond M are multiplied and not used
#pragma unroll
  for (int i = 0; i < T; ++i) {
    rows[i] = group_rows(acts, [=](int r) { return kLive == 1 ? 0 : i * kGroup + r; });
  }
  bool waits = true;
  int place = 0, run = blockIdx.x;
  for (int which = 0; which < 3 && p.w[which].num_bands > 0; ++which) {
    const Matrix& w = p.w[which];
    const int runs = (w.num_bands + R - 1) / R;
    if (run < runs) {
      const auto put = [&](int n, int v) { return part_of(cut, place + n, v); };
      const auto done = [&](int band) {
        __syncthreads();
        for (int at = threadIdx.x; at < R * M * 16; at += blockDim.x) {
          const int r = at & 15, n = (at >> 4) % R, i = (at >> 4) / R, row = (band + n) * 16 + r;
          if (row >= w.rows) {
            continue;
          }
          float sum = sum_parts(cut, place + n, i, r);
          if (p.bias[which] != nullptr) {
            sum += p.bias[which][row];
          }
          const i64 to = (i64)i * w.rows + row;
          if (which == 0 && p.residual != nullptr) {
            sum += p.residual[to];
          }
          p.out[which][to] = sum;
        }
        place ^= R;
      };
      dot_any<R, T, kLive, true>(w.type, {w.data, w.band_bytes, run * R, grid * R, w.num_bands},
                                 w.cols, rows, warp, cut, stages_of<R>(cut, warp), waits, put,
                                 done);
      waits = false;
      run += (runs - run + grid - 1) / grid * grid;
    }
    run -= runs;
  }
  if (waits) {
    wait_for_previous();
  }
}

// multiply_M_R: up to M rows, R bands a warp.
#define KT_MULTIPLY(M, R, T, LIVE)                               \
  extern "C" __global__ void __launch_bounds__(kMaxThreads)      \
      multiply_##M##_##R(Outputs p, Acts x, int rows, Cut cut) { \
    multiply<R, T, LIVE>(p, x, rows, cut);                       \
  }
KT_MULTIPLY(1, 1, 1, 1)
KT_MULTIPLY(1, 2, 1, 1)
KT_MULTIPLY(8, 1, 1, 2)
KT_MULTIPLY(8, 2, 1, 2)
KT_MULTIPLY(16, 1, 2, 2)
KT_MULTIPLY(16, 2, 2, 2)

// The (token, expert) pairs of a step by expert, built by group_pairs.
struct Groups {
  int* active;  // [E] experts that have pairs, ascending; [E] holds their number
  int* start;   // [E + 1] pairs of expert e: order[start[e]] .. order[start[e + 1] - 1]
  int* order;   // [T * K] pair numbers
};

// One block of 1024 threads. expert_of < 0: somebody else computes the pair.
extern "C" __global__ void __launch_bounds__(1024)
    group_pairs(const int* expert_of, int pairs, int experts, Groups g) {
  release_next();
  wait_for_previous();
  __shared__ int count[1024], first[1025];
  const int t = threadIdx.x;
  count[t] = 0;
  __syncthreads();
  for (int i = t; i < pairs; i += 1024) {
    if (expert_of[i] >= 0) {
      atomicAdd(&count[expert_of[i]], 1);
    }
  }
  __syncthreads();
  // Both prefix sums at once: pairs before an expert in the low half, active experts in the high.
  const int mine = count[t] + (count[t] > 0 ? 1 << 20 : 0);
  int sum = mine;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int left = __shfl_up_sync(~0u, sum, step);
    if ((t & 31) >= step) {
      sum += left;
    }
  }
  __shared__ int warp_sum_of[32];
  if ((t & 31) == 31) {
    warp_sum_of[t >> 5] = sum;
  }
  __syncthreads();
  for (int w = 0; w < (t >> 5); ++w) {
    sum += warp_sum_of[w];
  }
  first[t + 1] = sum & 0xfffff;
  if (t == 0) {
    first[0] = 0;
  }
  if (t < experts && count[t] > 0) {
    g.active[(sum >> 20) - 1] = t;
  }
  if (t == experts - 1) {
    g.active[experts] = sum >> 20;
  }
  __syncthreads();
  for (int e = t; e <= experts; e += 1024) {
    g.start[e] = first[e];
  }
  // In pair order within an expert, so that nothing depends on scheduling: each expert's thread
  // walks the pairs. Few pairs make this cheaper than a stable parallel sort.
  if (t < experts && count[t] > 0) {
    int at = first[t];
    for (int i = 0; i < pairs; ++i) {
      if (expert_of[i] == t) {
        g.order[at++] = i;
      }
    }
  }
}

// Where the pairs of blockIdx.y's expert are: order[first] .. order[end - 1].
struct Pairs {
  int expert, first, end;
};

// A step of one token: its experts all differ, pair i belongs to ids[i].
__device__ __forceinline__ Pairs pairs_of(const int* ids) {
  return {ids[blockIdx.y], (int)blockIdx.y, (int)blockIdx.y + 1};
}
__device__ __forceinline__ Pairs pairs_of(const Groups& g, int experts) {
  if ((int)blockIdx.y >= g.active[experts]) {
    return {-1, 0, 0};
  }
  const int expert = g.active[blockIdx.y];
  return {expert, g.start[expert], g.start[expert + 1]};
}

constexpr int kPass = kGroup;  // pairs of one expert computed per pass over its weights

// Whose products a warp computes for an expert: band `band` of a block's, of this type, data and
// columns; parts first, first + split, ...
struct Share {
  int type;
  const u8* data;
  int cols, band, first;
};

// Dot products of m <= kPass pairs with a band; row(i): the activation row of pair i < m.
template <bool kOne, typename Row>
__device__ __forceinline__ void dot_pairs(int m, const Share& share, const Acts& x, Row row,
                                          const Cut& cut, u8* stages, bool waits) {
  const GroupRows rows[1] = {group_rows(x, [=](int i) { return row(kOne ? 0 : min(i, m - 1)); })};
  const Bands bands = {share.data, 0, 0, 1, 1};
  const auto put = [&](int, int v) { return part_of(cut, share.band, v); };
  const auto done = [](int) {};
  if (kOne || m == 1) {
    dot_any<1, 1, 1, false>(share.type, bands, share.cols, rows, share.first, cut, stages, waits,
                            put, done);
  } else {
    dot_any<1, 1, 2, false>(share.type, bands, share.cols, rows, share.first, cut, stages, waits,
                            put, done);
  }
}

// One lane's value of block b of a row, quantised. A warp calls this for a whole block.
__device__ __forceinline__ void store_quantized(const Acts& to, int row, int b, float v) {
  const int lane = threadIdx.x & 31;
  float largest = fabsf(v);
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  const float scale = largest / 127.0f;
  const int q = __float2int_rn(v * inverse);
  int sum = q;
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, s);
  }
  const i64 at = place_of(row, to.blocks, b);
  to.q[(at * kGroup + row % kGroup) * 32 + lane] = (i8)q;
  if (lane == 0) {
    float* meta = to.meta + at * kMeta + row % kGroup;
    meta[0] = scale;
    meta[kGroup] = scale * sum;
  }
}

// h[row, I] = silu(gate x) * (up x), quantised; rows are pairs in the order of `order`. grid = (I /
// 32, most active experts); 4 * split warps: gate and up of two neighbouring bands.
template <int kRows>
__device__ __forceinline__ void gate_up(const Matrix& gate, const Matrix& up, const Acts& x,
                                        const Pairs& pairs, const int* order, int top_k,
                                        const Cut& cut, const Acts& h) {
  if (pairs.expert < 0) {
    return;
  }
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, role = warp / cut.split;
  const Matrix& w = (role & 1) == 0 ? gate : up;
  const Share share = {
      w.type,
      w.data + pairs.expert * w.expert_bytes + (2 * blockIdx.x + (role >> 1)) * w.band_bytes,
      gate.cols, role, warp % cut.split};
  for (int at = pairs.first; at < pairs.end; at += kPass) {
    const int m = min(kPass, pairs.end - at);
    dot_pairs<kRows == 1>(
        m, share, x, [=](int i) { return (kRows == 1 ? at : order[at + i]) / top_k; }, cut,
        stages_of<1>(cut, warp), false);
    __syncthreads();
    for (int i = warp; i < m; i += blockDim.x >> 5) {
      const int role_of_lane = 2 * (lane >> 4);
      const float gated = sum_parts(cut, role_of_lane, i, lane & 15);
      const float other = sum_parts(cut, role_of_lane + 1, i, lane & 15);
      store_quantized(h, at + i, blockIdx.x, gated / (1.0f + __expf(-gated)) * other);
    }
    __syncthreads();
  }
}

// y[pair, H] = down h; grid = (bands / bands of a block, most active experts).
template <int kRows>
__device__ __forceinline__ void down_rows(const Matrix& down, const Acts& h, const Pairs& pairs,
                                          const int* order, const Cut& cut, float* y) {
  if (pairs.expert < 0) {
    wait_for_previous();
    return;
  }
  const int warp = threadIdx.x >> 5, bands = cut.sums;
  const int band = blockIdx.x * bands + warp / cut.split;
  const Share share = {down.type,
                       down.data + pairs.expert * down.expert_bytes + band * down.band_bytes,
                       down.cols, warp / cut.split, warp % cut.split};
  for (int at = pairs.first; at < pairs.end; at += kPass) {
    const int m = min(kPass, pairs.end - at);
    if (band < down.num_bands) {
      dot_pairs<kRows == 1>(
          m, share, h, [=](int i) { return at + i; }, cut, stages_of<1>(cut, warp), true);
    }
    __syncthreads();
    for (int n = threadIdx.x; n < bands * m * 16; n += blockDim.x) {
      const int r = n & 15, b = (n >> 4) % bands, i = (n >> 4) / bands;
      const int row = (blockIdx.x * bands + b) * 16 + r;
      if (row < down.rows) {
        const i64 pair = kRows == 1 ? at : order[at + i];
        y[pair * down.rows + row] = sum_parts(cut, b, i, r);
      }
    }
    __syncthreads();
  }
}

// The kernels below release the next one only once the one before has ended, so that the next may
// read which experts there are, and ask for their weights, before this one ends.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    experts_gate_up_1(Matrix gate, Matrix up, Acts x, const int* ids, Cut cut, Acts h) {
  wait_for_previous();
  release_next();
  gate_up<1>(gate, up, x, pairs_of(ids), nullptr, gridDim.y, cut, h);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    experts_gate_up_n(Matrix gate, Matrix up, Acts x, Groups g, int experts, int top_k, Cut cut,
                      Acts h) {
  wait_for_previous();
  release_next();
  gate_up<kPass>(gate, up, x, pairs_of(g, experts), g.order, top_k, cut, h);
}
// These wait for the activations in dot_tiles.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    experts_down_1(Matrix down, Acts h, const int* ids, Cut cut, float* y) {
  release_next();
  down_rows<1>(down, h, pairs_of(ids), nullptr, cut, y);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    experts_down_n(Matrix down, Acts h, Groups g, int experts, Cut cut, float* y) {
  release_next();
  down_rows<kPass>(down, h, pairs_of(g, experts), g.order, cut, y);
}

// out[t] = residual[t] + sum over k of weight[t, k] * y[t * top_k + k], k in order; grid = (T, n).
extern "C" __global__ void experts_sum(const float* y, const int* expert_of, const float* weight,
                                       int top_k, int cols, const float* residual, float* out) {
  release_next();
  wait_for_previous();
  const i64 token = blockIdx.x;
  for (int c = blockIdx.y * blockDim.x + threadIdx.x; c < cols; c += gridDim.y * blockDim.x) {
    float sum = 0.0f;
    for (int k = 0; k < top_k; ++k) {
      const i64 pair = token * top_k + k;
      if (expert_of[pair] >= 0) {
        sum += weight[pair] * y[pair * cols + c];
      }
    }
    out[token * cols + c] = residual[token * cols + c] + sum;
  }
}

// A band's rows as bf16, from row `first` of the matrix `to` on; rows beyond it are not written.
__device__ __forceinline__ void dequantize_band(const Matrix& w, const u8* band, int first,
                                                u16* to) {
  const int warps = blockDim.x >> 5, units = (w.cols / 32 + kUnitBlocks - 1) / kUnitBlocks;
  for (int u = threadIdx.x >> 5; u < units; u += warps) {
    decode_any(w.type, band, w.cols, u, [=](int r, int column, const float (&v)[8]) {
      if (first + r < w.rows) {
        *reinterpret_cast<uint4*>(to + (i64)(first + r) * w.cols + column) =
            make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]),
                       bf16_pair(v[6], v[7]));
      }
    });
  }
}

// out bf16 [experts, rows, cols]; grid = (bands, experts).
extern "C" __global__ void __launch_bounds__(kThreads) dequantize(Matrix w, u16* out) {
  release_next();
  wait_for_previous();
  const u8* band = w.data + blockIdx.y * w.expert_bytes + blockIdx.x * w.band_bytes;
  dequantize_band(w, band, blockIdx.x * 16, out + (i64)blockIdx.y * w.rows * w.cols);
}
