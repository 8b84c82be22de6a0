// linear.cu: quantised matrix times few rows on the GPU, straight from R16 bands.
//
// The bands are the bytes the CPU kernels use (native/src/kernels/layout.h), so an expert moves
// between CPU and GPU without conversion. Compiled at start-up by NVRTC after formats.cu.
//
// Mapping: `split` warps share a band (16 output rows) and take its tiles of 256 columns, copied to
// shared memory a few tiles ahead. A tile's 32-column blocks meet 1, 2, 4 or 8 rows of activations
// in integer matrix instructions; with less than 8 rows the right operand's columns hold several
// blocks, each against the rows, so that every lane ends up with sums of its own. Integer dots of a
// block are exact; the f32 part of a block is
//     sum += (scale_x * s) * dot;  sum -= m * sum_x
// and blocks are added in an order that depends on the matrix alone: a band has `parts` sums, part
// v of tiles v, v + parts, ..., each of four sums by block number mod 4, added ((0 + 1) + (2 + 3));
// then the parts in turn. A row's result is therefore the same whatever runs beside it.

constexpr int kThreads = 256;
constexpr int kMaxThreads = 512;

// How the host cut a launch (engine/cuda/gemv.py). Dynamic shared memory: part_floats partial sums
// for each part of each band of a block, then for each warp `stages` (1 .. 4) stages of
// stage_bytes.
struct Cut {
  int parts, split;  // split divides parts, parts <= tiles
  int stages, stage_bytes, part_floats;
  int bands_shift;  // a block does 1 << bands_shift bands
};

// Sums of part v of a block's band b: at column * 17 + row.
__device__ __forceinline__ float* part_of(const Cut& cut, int b, int v) {
  return reinterpret_cast<float*>(shared_memory) + (b * cut.parts + v) * cut.part_floats;
}
__device__ __forceinline__ u8* stages_of(const Cut& cut, int warp) {
  const int sums = (cut.parts * cut.part_floats * 4) << cut.bands_shift;
  return shared_memory + sums + warp * cut.stages * cut.stage_bytes;
}
// A value of a band, its parts added in turn.
__device__ __forceinline__ float sum_parts(const Cut& cut, int b, int column, int r) {
  float sum = 0.0f;
  for (int v = 0; v < cut.parts; ++v) {
    sum += part_of(cut, b, v)[column * 17 + r];
  }
  return sum;
}

// Quantised activations [M, cols] in 32-column blocks, the rows side by side within a block, so
// that a tile's loads lie together.
struct Acts {
  i8* q;         // [cols / 32, M, 32]
  float4* meta;  // [cols / 32, M]: scale, scale * sum of the first 16 q, of the other 16, of all
  int rows;      // M of the layout
};

// Where a lane's rows of a tile of N columns lie: one to multiply, two to scale.
struct TileRows {
  u32 multiply;
  u32 scale[2];
};

// row(i): the activation row of column i < N.
template <int N, typename Row>
__device__ __forceinline__ TileRows tile_rows(Row row) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  return {(u32)(row(g % N) * 32 + 8 * t), {(u32)row(2 * t % N), (u32)row(2 * t % N + 1)}};
}

// What a lane reads of the activations for one tile of N columns, which meets 8 / N blocks.
struct Inputs {
  uint2 q;
  float4 meta[2];
};

// The block of tile p of a unit that the lane's results belong to.
template <int N>
__device__ __forceinline__ int own_block(int p) {
  return p * (8 / N) + 2 * (threadIdx.x & 3) / N;
}

// Tile p of unit u.
template <int N, int kLive>
__device__ __forceinline__ void load_inputs(const Acts& x, int num_blocks, int u, int p,
                                            const TileRows& rows, Inputs& out) {
  const int g = (threadIdx.x & 31) >> 2;
  const int b = min(4 * u + p * (8 / N) + g / N, num_blocks - 1);
  out.q = __ldg(reinterpret_cast<const uint2*>(x.q + (u32)(b * x.rows * 32 + rows.multiply)));
  const int own = min(4 * u + own_block<N>(p), num_blocks - 1);
#pragma unroll
  for (int i = 0; i < kLive; ++i) {
    out.meta[i] = __ldg(x.meta + (u32)(own * x.rows + rows.scale[i]));
  }
}

// An integer of less than 23 bits in a float's mantissa: adding to the bits counts ones.
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// One result's share of a block.
template <int kType>
__device__ __forceinline__ float add_block(float sum, const float4& x, const Scales<kType>& w,
                                           int r, int first, int second) {
  const float dot = __int_as_float(first) - kMagic;
  sum = __fmaf_rn(__fmul_rn(x.x, w.s[r][0]), dot, sum);
  if constexpr (kType == kQ6_K) {
    const float other = __int_as_float(second) - kMagic;
    sum = __fmaf_rn(__fmul_rn(x.x, w.s[r][1]), other, sum);
    sum = __fmaf_rn(__fmul_rn(-32.0f, w.s[r][0]), x.y, sum);
    return __fmaf_rn(__fmul_rn(-32.0f, w.s[r][1]), x.z, sum);
  } else if constexpr (has_min<kType>()) {
    return __fmaf_rn(-w.m[r], x.w, sum);
  }
  return sum;
}

// Adds the products of a unit with tile p of each of the T groups of N rows. kLive of a lane's two
// columns exist.
template <int kType, int N, int T, int kLive>
__device__ __forceinline__ void add_tile(const Unit<kType>& unit, const Scales<kType>& mine, int p,
                                         const Inputs (&x)[T], float (&sum)[T][N / 2][2][2]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  constexpr int kChain = 8 / N, kHalves = kType == kQ6_K ? 2 : 1;
  int dot[T][kHalves][4];
#pragma unroll
  for (int c = 0; c < kChain; ++c) {
    u32 a[4];
    decode_block<kType>(unit, p * kChain + c, t, a);
#pragma unroll
    for (int i = 0; i < T; ++i) {
      const uint2 zero = make_uint2(0, 0);
      const uint2 b = kChain == 1 || g / N == c ? x[i].q : zero;
      const int none[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const uint2 part = kHalves == 1 || (t < 2) == (h == 0) ? b : zero;
        if (c == 0) {
          multiply_tile(dot[i][h], a, part, none);
        } else {
          multiply_tile(dot[i][h], a, part, dot[i][h]);
        }
      }
    }
  }
  const Scales<kType> w = N == 2 ? mine : scales_from<kType>(mine, (lane & ~3) | own_block<N>(p));
#pragma unroll
  for (int i = 0; i < T; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int k = 0; k < kLive; ++k) {
        sum[i][p][r][k] = add_block<kType>(sum[i][p][r][k], x[i].meta[k], w, r,
                                           dot[i][0][2 * r + k], dot[i][kHalves - 1][2 * r + k]);
      }
    }
  }
}

// The tiles of a warp in turn: those of part v, v + split, ...
struct TileOrder {
  int v, tile;

  __device__ __forceinline__ void advance(const Cut& cut, int tiles) {
    tile += cut.parts;
    if (tile >= tiles) {
      v += cut.split;
      tile = v;
    }
  }
};

// Leaves a part's sums of T groups of N rows in part[column * 17 + row].
template <int N, int T, int kLive>
__device__ __forceinline__ void store_part(const float (&sum)[T][N / 2][2][2], float* part) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < T; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int k = 0; k < kLive; ++k) {
        float total;
        if constexpr (N == 8) {
          total = __fadd_rn(__fadd_rn(sum[i][0][r][k], sum[i][1][r][k]),
                            __fadd_rn(sum[i][2][r][k], sum[i][3][r][k]));
        } else if constexpr (N == 4) {
          const float low = sum[i][0][r][k], high = sum[i][1][r][k];
          total = __fadd_rn(__fadd_rn(low, __shfl_xor_sync(~0u, low, 2)),
                            __fadd_rn(high, __shfl_xor_sync(~0u, high, 2)));
        } else {
          total = sum[i][0][r][k];
          total = __fadd_rn(total, __shfl_xor_sync(~0u, total, 1));
          total = __fadd_rn(total, __shfl_xor_sync(~0u, total, 2));
        }
        if (2 * t < N) {
          part[(i * N + 2 * t + k) * 17 + 2 * g + r] = total;
        }
      }
    }
  }
}

// Dot products of the parts first, first + split, ... of a block's band b with T groups of N rows.
// kWaits: the activations come from the kernel before, the weights do not.
template <int kType, int N, int T, int kLive, bool kWaits>
__device__ __forceinline__ void dot_tiles(const u8* band, int cols, const Acts& x,
                                          const TileRows (&rows)[T], int first, const Cut& cut,
                                          u8* stages, int b) {
  const int num_blocks = cols / 32, tiles = (cols + 255) / 256;
  constexpr bool kEarly = N * T <= 4;  // few enough registers for a tile's inputs
  TileOrder ahead = {first, first}, now = ahead;
  for (int d = 0; d < cut.stages; ++d) {
    if (ahead.v < cut.parts) {
      copy_tile<kType>(stages + d * cut.stage_bytes, band, cols, ahead.tile);
      ahead.advance(cut, tiles);
    }
    end_copies();
  }
  if (kWaits) {
    wait_for_previous();
  }
  float sum[T][N / 2][2][2] = {};
  u8* stage = stages;
  while (now.v < cut.parts) {
    const int tile = now.tile, nb = blocks_of_tile<kType>(cols, tile);
    Inputs early[2][kEarly ? N / 2 : 1][T];
    if (kEarly) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < T; ++i) {
          load_inputs<N, kLive>(x, num_blocks, 2 * tile + n / (N / 2), n % (N / 2), rows[i],
                                early[n / (N / 2)][kEarly ? n % (N / 2) : 0][i]);
        }
      }
    }
    wait_for_copies(cut.stages - 1);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!has_whole_tiles<kType>() && half * kUnitBlocks >= nb) {
        break;
      }
      Unit<kType> unit;
      load_unit<kType>(stage, stage + tile_bytes<kType>(), nb, half, unit);
      const Scales<kType> mine = scales_of<kType>(unit, nb, half);
#pragma unroll
      for (int p = 0; p < N / 2; ++p) {
        if (kEarly) {
          add_tile<kType, N, T, kLive>(unit, mine, p, early[half][kEarly ? p : 0], sum);
        } else {
          Inputs inputs[T];
#pragma unroll
          for (int i = 0; i < T; ++i) {
            load_inputs<N, kLive>(x, num_blocks, 2 * tile + half, p, rows[i], inputs[i]);
          }
          add_tile<kType, N, T, kLive>(unit, mine, p, inputs, sum);
        }
      }
    }
    __syncwarp();
    if (ahead.v < cut.parts) {
      copy_tile<kType>(stage, band, cols, ahead.tile);
      ahead.advance(cut, tiles);
    }
    end_copies();
    stage += cut.stage_bytes;
    if (stage == stages + cut.stages * cut.stage_bytes) {
      stage = stages;
    }
    const int v = now.v;
    now.advance(cut, tiles);
    if (now.v != v) {
      store_part<N, T, kLive>(sum, part_of(cut, b, v));
#pragma unroll
      for (int i = 0; i < T; ++i) {
#pragma unroll
        for (int p = 0; p < N / 2; ++p) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sum[i][p][r][0] = sum[i][p][r][1] = 0.0f;
          }
        }
      }
    }
  }
}

template <int N, int T, int kLive, bool kWaits>
__device__ __forceinline__ void dot_any(int type, const u8* band, int cols, const Acts& x,
                                        const TileRows (&rows)[T], int first, const Cut& cut,
                                        u8* stages, int b) {
  switch (type) {
#define KT_CASE(t) \
  case t:          \
    return dot_tiles<t, N, T, kLive, kWaits>(band, cols, x, rows, first, cut, stages, b);
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

// Which matrix a band of all of them belongs to; 3: none. Makes band relative.
__device__ __forceinline__ int matrix_of(const Outputs& p, int& band) {
  int which = 0;
  while (which < 3 && band >= p.w[which].num_bands) {
    band -= p.w[which++].num_bands;
  }
  return which;
}

// M <= N * T rows. Each block does blockDim / (32 * split) bands.
template <int N, int T, int kLive>
__device__ __forceinline__ void multiply(const Outputs& p, const Acts& acts, int M,
                                         const Cut& cut) {
  release_next();
  const int warp = threadIdx.x >> 5, bands = 1 << cut.bands_shift;
  int band = blockIdx.x * bands + warp / cut.split;
  const int which = matrix_of(p, band);
  if (which < 3) {
    const Matrix& w = p.w[which];
    TileRows rows[T];
#pragma unroll
    for (int i = 0; i < T; ++i) {
      rows[i] = tile_rows<N>([=](int column) { return min(i * N + column, M - 1); });
    }
    dot_any<N, T, kLive, true>(w.type, w.data + band * w.band_bytes, w.cols, acts, rows,
                               warp % cut.split, cut, stages_of(cut, warp), warp / cut.split);
  } else {
    wait_for_previous();
  }
  __syncthreads();
  for (int at = threadIdx.x; at < bands * M * 16; at += blockDim.x) {
    const int r = at & 15, b = (at >> 4) & (bands - 1), i = at >> (4 + cut.bands_shift);
    int relative = blockIdx.x * bands + b;
    const int owner = matrix_of(p, relative);
    const int row = relative * 16 + r;
    if (owner == 3 || row >= p.w[owner].rows) {
      continue;
    }
    float sum = sum_parts(cut, b, i, r);
    if (p.bias[owner] != nullptr) {
      sum += p.bias[owner][row];
    }
    const i64 to = (i64)i * p.w[owner].rows + row;
    if (owner == 0 && p.residual != nullptr) {
      sum += p.residual[to];
    }
    p.out[owner][to] = sum;
  }
}

#define KT_MULTIPLY(M, N, T, LIVE)                          \
  extern "C" __global__ void __launch_bounds__(kMaxThreads) \
      multiply_##M(Outputs p, Acts x, int rows, Cut cut) {  \
    multiply<N, T, LIVE>(p, x, rows, cut);                  \
  }
KT_MULTIPLY(1, 2, 1, 1)
KT_MULTIPLY(2, 2, 1, 2)
KT_MULTIPLY(4, 4, 1, 2)
KT_MULTIPLY(8, 8, 1, 2)
KT_MULTIPLY(16, 8, 2, 2)

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

constexpr int kPass = 8;  // pairs of one expert computed per pass over its weights

// Dot products of m <= kPass pairs with a band; pair(i): the activation row of pair i < m.
template <bool kWaits, typename Row>
__device__ __forceinline__ void dot_pairs(int m, int type, const u8* band, int cols, const Acts& x,
                                          Row row, int first, const Cut& cut, u8* stages, int b) {
  if (m <= 2) {
    const TileRows rows[1] = {tile_rows<2>(row)};
    dot_any<2, 1, 2, kWaits>(type, band, cols, x, rows, first, cut, stages, b);
  } else if (m <= 4) {
    const TileRows rows[1] = {tile_rows<4>(row)};
    dot_any<4, 1, 2, kWaits>(type, band, cols, x, rows, first, cut, stages, b);
  } else {
    const TileRows rows[1] = {tile_rows<8>(row)};
    dot_any<8, 1, 2, kWaits>(type, band, cols, x, rows, first, cut, stages, b);
  }
}
template <bool kWaits>
__device__ __forceinline__ void dot_pair(int type, const u8* band, int cols, const Acts& x, int row,
                                         int first, const Cut& cut, u8* stages, int b) {
  const TileRows rows[1] = {tile_rows<2>([=](int) { return row; })};
  dot_any<2, 1, 1, kWaits>(type, band, cols, x, rows, first, cut, stages, b);
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
  for (int s = 8; s > 0; s >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, s);
  }
  const int other = __shfl_xor_sync(~0u, sum, 16);
  const i64 at = (i64)b * to.rows + row;
  to.q[at * 32 + lane] = (i8)q;
  if (lane == 0) {
    to.meta[at] = make_float4(scale, scale * sum, scale * other, scale * (sum + other));
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
  const bool is_gate = (role & 1) == 0;
  const int type = is_gate ? gate.type : up.type, cols = gate.cols;
  const u8* band = (is_gate ? gate.data : up.data) +
                   pairs.expert * (is_gate ? gate.expert_bytes : up.expert_bytes) +
                   (2 * blockIdx.x + (role >> 1)) * (is_gate ? gate.band_bytes : up.band_bytes);
  for (int at = pairs.first; at < pairs.end; at += kPass) {
    const int m = min(kPass, pairs.end - at);
    if (kRows == 1) {
      dot_pair<false>(type, band, cols, x, at / top_k, warp % cut.split, cut, stages_of(cut, warp),
                      warp / cut.split);
    } else {
      dot_pairs<false>(
          m, type, band, cols, x, [=](int i) { return order[at + min(i, m - 1)] / top_k; },
          warp % cut.split, cut, stages_of(cut, warp), warp / cut.split);
    }
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
  const int warp = threadIdx.x >> 5, bands = 1 << cut.bands_shift;
  const int band = blockIdx.x * bands + warp / cut.split;
  const u8* data = down.data + pairs.expert * down.expert_bytes + band * down.band_bytes;
  for (int at = pairs.first; at < pairs.end; at += kPass) {
    const int m = min(kPass, pairs.end - at);
    if (band < down.num_bands) {
      if (kRows == 1) {
        dot_pair<true>(down.type, data, down.cols, h, at, warp % cut.split, cut,
                       stages_of(cut, warp), warp / cut.split);
      } else {
        dot_pairs<true>(
            m, down.type, data, down.cols, h, [=](int i) { return at + min(i, m - 1); },
            warp % cut.split, cut, stages_of(cut, warp), warp / cut.split);
      }
    }
    __syncthreads();
    for (int n = threadIdx.x; n < bands * m * 16; n += blockDim.x) {
      const int r = n & 15, b = (n >> 4) & (bands - 1), i = n >> (4 + cut.bands_shift);
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
extern "C" __global__ void __launch_bounds__(kMaxThreads, 2)
    experts_gate_up_1(Matrix gate, Matrix up, Acts x, const int* ids, Cut cut, Acts h) {
  wait_for_previous();
  release_next();
  gate_up<1>(gate, up, x, pairs_of(ids), nullptr, gridDim.y, cut, h);
}
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    experts_gate_up_n(Matrix gate, Matrix up, Acts x, Groups g, int experts, int top_k, Cut cut,
                      Acts h) {
  wait_for_previous();
  release_next();
  gate_up<kPass>(gate, up, x, pairs_of(g, experts), g.order, top_k, cut, h);
}
// These wait for the activations in dot_tiles.
extern "C" __global__ void __launch_bounds__(kMaxThreads, 2)
    experts_down_1(Matrix down, Acts h, const int* ids, Cut cut, float* y) {
  release_next();
  down_rows<1>(down, h, pairs_of(ids), nullptr, cut, y);
}
extern "C" __global__ void __launch_bounds__(kMaxThreads)
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
