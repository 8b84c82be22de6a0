// prompt_experts.cu: routed experts times many rows, straight from R16 bands, in bf16 and on tensor
// cores. Follows prefill.cu, whose group_rows_by_expert sorts the rows.
//
// A block of eight warps multiplies 64 rows of one expert with 16 bands (gate and up: eight of
// each), a warp with two bands. Only the rows go through shared memory, 128 columns at a time. A
// lane decodes its weights to bf16 right where the matrix instructions want them: lane 4 g + t
// reads rows 2 g and 2 g + 1 of a band, columns 8 t .. 8 t + 7 of a block of 32. They are rows g
// and g + 8 of two left operands, whose columns are in another order, the same for the right ones:
// there the lane's 16 bytes of row g, as they lie in memory.
//
// A row's products are added column block after column block, whatever the number of rows.

constexpr int kPromptRows = 64;  // of a block
constexpr int kPromptWarps = 8;
constexpr int kPromptBlocks = 2;                            // of a multiprocessor at once
constexpr int kPromptCols = 128;                            // of a stage: a unit of a band
constexpr int kStageBytes = kPromptRows * kPromptCols * 2;  // two of them

// 16 bytes c (0 .. 15) of a stage's row; neighbouring rows' lie in other banks.
__device__ __forceinline__ int stage_place(int row, int c) {
  return row * kPromptCols * 2 + (c ^ (row & 1) << 2) * 16;
}

// The rows of a tile: thread i copies 16 bytes of every 16th row.
struct RowCopies {
  const u16* from[4];

  // row(i): where row i < 64 begins.
  template <typename Row>
  __device__ __forceinline__ explicit RowCopies(Row row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      from[i] = row((threadIdx.x >> 4) + 16 * i) + (threadIdx.x & 15) * 8;
    }
  }
  // Columns from `column` on of `cols`.
  __device__ __forceinline__ void start(u8* stage, int column, int cols) const {
    const int c = threadIdx.x & 15;
    if (column + 8 * c < cols) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_16(stage + stage_place((threadIdx.x >> 4) + 16 * i, c),
                reinterpret_cast<const u8*>(from[i] + column));
      }
    }
    end_copies();
  }
};

// The types whose integers decode_block leaves as signed bytes; the others' are 0 .. 31.
template <int kType>
constexpr bool is_signed() {
  return !has_min<kType>();
}

// Block j of a unit as bf16: b[r] are columns 8 t .. 8 t + 7 of row 2 g + r. Integers become floats
// as the last bits of 2^23: type conversions are slow.
template <int kType>
__device__ __forceinline__ void decode_bf16(const Unit<kType>& unit, const Scales<kType>& mine,
                                            int j, u32 (&b)[2][4]) {
  constexpr float kZero = is_signed<kType>() ? 8388608.0f + 128.0f : 8388608.0f;
  const int lane = threadIdx.x & 31, t = lane & 3;
  float s[2][kType == kQ6_K ? 2 : 1], m[2] = {};
  factors_from<kType>(mine, (lane & ~3) | j, s);
  if constexpr (has_min<kType>()) {
    m[0] = __shfl_sync(~0u, mine.m[0] * mine.dm[0], (lane & ~3) | j);
    m[1] = __shfl_sync(~0u, mine.m[1] * mine.dm[1], (lane & ~3) | j);
  }
  u32 a[4];
  decode_block<kType>(unit, j, t, a);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = s[r][kType == kQ6_K ? t >> 1 : 0];
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 bytes =
          is_signed<kType>() ? a[r + 2 * (i >> 2)] ^ 0x80808080u : a[r + 2 * (i >> 2)];
      const float q =
          __fadd_rn(__uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 | (i & 3))), -kZero);
      v[i] = has_min<kType>() ? __fmaf_rn(factor, q, -m[r]) : factor * q;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[r][i] = bf16_pair(v[2 * i], v[2 * i + 1]);
    }
  }
}

// Sums of two bands: [band][8 rows][as multiply_add leaves them].
typedef float PromptSums[2][kPromptRows / 8][4];

// All columns of m <= 64 rows with two bands. All warps of the block call this together.
template <int kType>
__device__ __forceinline__ void multiply_bands(const u8* const (&band)[2], int cols,
                                               const RowCopies& rows, int m, PromptSums& sum) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int units = (cols + kPromptCols - 1) / kPromptCols;
  __syncthreads();  // the stages may still be read
  rows.start(shared_memory, 0, cols);
  for (int u = 0; u < units; ++u) {
    const int tile = u >> 1, nb = blocks_of_tile<kType>(cols, tile);
    Unit<kType> unit[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_unit<kType, false>(tile_at<kType>(band[n], cols, tile), band[n] + tile * 32, nb, u & 1,
                              unit[n]);
    }
    wait_for_copies(0);
    __syncthreads();
    if (u + 1 < units) {
      rows.start(shared_memory + ((u + 1) & 1) * kStageBytes, (u + 1) * kPromptCols, cols);
    }
    const u8* stage = shared_memory + (u & 1) * kStageBytes;
    Scales<kType> mine[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mine[n] = scales_of<kType>(unit[n], nb, u & 1);
    }
#pragma unroll
    for (int j = 0; j < kUnitBlocks; ++j) {
      if (!has_whole_tiles<kType>() && (u & 1) * kUnitBlocks + j >= nb) {
        break;
      }
      u32 b[2][2][4];
      decode_bf16<kType>(unit[0], mine[0], j, b[0]);
      decode_bf16<kType>(unit[1], mine[1], j, b[1]);
#pragma unroll
      for (int i = 0; i < kPromptRows / 8; ++i) {
        if (8 * i >= m) {
          break;
        }
        const uint4 x = *reinterpret_cast<const uint4*>(stage + stage_place(8 * i + g, 4 * j + t));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          multiply_add(sum[n][i], b[n][0][0], b[n][1][0], b[n][0][1], b[n][1][1], x.x, x.y);
          multiply_add(sum[n][i], b[n][0][2], b[n][1][2], b[n][0][3], b[n][1][3], x.z, x.w);
        }
      }
    }
  }
}

__device__ __forceinline__ void multiply_any(int type, const u8* const (&band)[2], int cols,
                                             const RowCopies& rows, int m, PromptSums& sum) {
  switch (type) {
#define KT_CASE(t) \
  case t:          \
    return multiply_bands<t>(band, cols, rows, m, sum);
    KT_TYPES(KT_CASE)
#undef KT_CASE
  }
}

// Stores the lane's sums of m rows of eight as bf16: rows 2 t and 2 t + 1, of the band's rows 2 g
// and 2 g + 1. to: column 0 of row 0; `at`: the band's first column of `cols`.
__device__ __forceinline__ void store_band(const float (&sum)[kPromptRows / 8][4], u16* to,
                                           int stride, int at, int cols, int m) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < kPromptRows / 8; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 8 * i + 2 * t + r;
      if (row < m && at + 2 * g < cols) {
        *reinterpret_cast<u32*>(to + (i64)row * stride + at + 2 * g) =
            bf16_pair(sum[i][r], sum[i][2 + r]);
      }
    }
  }
}

// blockIdx.y = expert * turns + the block's turn: blocks of an expert take its tiles in turns.
struct PromptTiles {
  const u16* x;      // [*, cols] bf16
  const int* order;  // the row's pair, whose token is pair / top_k; null: rows are x's own
  int top_k;
  const int* ends;  // [experts]
  int turns;

  __device__ __forceinline__ int expert() const { return blockIdx.y / turns; }

  // each(first row, its number of rows <= 64, copies)
  template <typename Each>
  __device__ __forceinline__ void visit(int cols, Each each) const {
    const int e = expert(), begin = e == 0 ? 0 : ends[e - 1], end = ends[e];
    for (int first = begin + blockIdx.y % turns * kPromptRows; first < end;
         first += turns * kPromptRows) {
      const int m = min(kPromptRows, end - first);
      const RowCopies rows([&](int i) {
        const int row = first + min(i, m - 1);
        return x + (i64)(order == nullptr ? row : order[row] / top_k) * cols;
      });
      each(first, m, rows);
    }
  }
};

// y bf16 [sorted rows, stride]: rows times w, from column `column` on. grid.x = bands / 16.
extern "C" __global__ void __launch_bounds__(32 * kPromptWarps, kPromptBlocks)
    prompt_products(Matrix w, PromptTiles tiles, int stride, int column, u16* y) {
  release_next();
  wait_for_previous();
  const int own = 2 * (blockIdx.x * kPromptWarps + (threadIdx.x >> 5));
  const u8* data = w.data + tiles.expert() * w.expert_bytes;
  const u8* const band[2] = {data + min(own, w.num_bands - 1) * w.band_bytes,
                             data + min(own + 1, w.num_bands - 1) * w.band_bytes};
  tiles.visit(w.cols, [&](int first, int m, const RowCopies& rows) {
    PromptSums sum = {};
    multiply_any(w.type, band, w.cols, rows, m, sum);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      store_band(sum[n], y + (i64)first * stride + column, stride, (own + n) * 16, w.rows, m);
    }
  });
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// h bf16 [sorted rows, I] = silu(gate x) * (up x), both of one type. grid.x = bands / 8.
extern "C" __global__ void __launch_bounds__(32 * kPromptWarps, kPromptBlocks)
    prompt_gate_up(Matrix gate, Matrix up, PromptTiles tiles, u16* h) {
  release_next();
  wait_for_previous();
  const int own = blockIdx.x * kPromptWarps + (threadIdx.x >> 5);
  const i64 at =
      tiles.expert() * gate.expert_bytes + min(own, gate.num_bands - 1) * gate.band_bytes;
  const u8* const band[2] = {gate.data + at, up.data + at};
  tiles.visit(gate.cols, [&](int first, int m, const RowCopies& rows) {
    PromptSums sum = {};
    multiply_any(gate.type, band, gate.cols, rows, m, sum);
#pragma unroll
    for (int i = 0; i < kPromptRows / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[0][i][c] = silu(sum[0][i][c]) * sum[1][i][c];
      }
    }
    store_band(sum[0], h + (i64)first * gate.rows, gate.rows, own * 16, gate.rows, m);
  });
}

// Where gate and up have two types: h bf16 [rows, cols] = silu(gate) * up of gate_up bf16
// [rows, 2 * cols]; grid.x = most rows.
extern "C" __global__ void silu_mul_rows(const u16* gate_up, int cols, const int* num_rows,
                                         u16* h) {
  release_next();
  wait_for_previous();
  const i64 row = blockIdx.x;
  if (row >= *num_rows) {
    return;
  }
  const u32* gate = reinterpret_cast<const u32*>(gate_up + row * 2 * cols);
  const u32* up = gate + cols / 2;
  u32* to = reinterpret_cast<u32*>(h + row * cols);
  for (int i = threadIdx.x; i < cols / 2; i += blockDim.x) {
    const u32 g = gate[i], u = up[i];
    const float g0 = bf16_low(g), g1 = bf16_high(g);
    to[i] = bf16_pair(silu(g0) * bf16_low(u), silu(g1) * bf16_high(u));
  }
}
