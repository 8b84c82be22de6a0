// linear.cu: quantised matrix times few rows on the GPU, straight from R16 bands.
//
// The bands are the bytes the CPU kernels use (native/src/kernels/layout.h), so an expert moves
// between CPU and GPU without conversion. Header-free: compiled at start-up by NVRTC.
//
// Mapping: one block of 256 threads owns one band (16 output rows). A half warp takes one 32-column
// block at a time, lane r = row r, so that its four loads are whole 64-byte lines. Integer dots of
// 16 columns are exact; the f32 part of a block is
//     scale_x * (s0 * dot0 + s1 * dot1) - (m0 * sum0 + m1 * sum1)
// as on the CPU. Partial sums of the 16 half warps are added in a fixed order.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef signed char i8;
typedef long long i64;

// Programmatic dependent launch: a kernel may start while the one before it ends. Every kernel
// calls wait_for_previous() before it touches what an earlier kernel wrote (weights and the step's
// metadata are not that) and before it writes anything; release_next() lets the next one start
// early. Both do nothing before sm_90, where kernels are launched one after another.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

constexpr int kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13,
              kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kMXFP4 = 39;
constexpr int kThreads = 256;
constexpr int kHalfWarps = kThreads / 16;

// As filled by the host (engine/cuda_kernels.py).
struct Matrix {
  const u8* data;
  i64 band_bytes;
  i64 expert_bytes;
  int type, rows, cols, num_bands;
};

// Activations of a step, one row after another.
struct Acts {
  const i8* q;         // [M, cols]
  const float* scale;  // [M, cols / 32]
  const float* sum16;  // [M, cols / 16] scale * sum of 16 q
};

__device__ __forceinline__ float half_at(const u8* p) {
  float f;
  const u16 h = *reinterpret_cast<const u16*>(p);
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u32 word_at(const u8* p) {
  return __ldcs(reinterpret_cast<const u32*>(p));
}

// One row's 32 columns: weight = s * q - m with s, m per 16 columns.
struct Block {
  int q[8];
  float s0, s1, m0, m1;
};

__device__ __forceinline__ void load_nibbles(const u8* lines, int r, Block& out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 w = word_at(lines + i * 64 + r * 4);
    out.q[2 * i] = w & 0x0f0f0f0f;
    out.q[2 * i + 1] = (w >> 4) & 0x0f0f0f0f;
  }
}

// q holds four table indices 0..15 as bytes.
__device__ __forceinline__ int look_up(int q, const u32* table) {
  const u32 pairs = q | (q >> 4);
  const u32 select = (pairs & 0xff) | ((pairs >> 8) & 0xff00);
  const u32 low = __byte_perm(table[0], table[1], select & 0x7777);
  const u32 high = __byte_perm(table[2], table[3], select & 0x7777);
  const u32 mask = ((q >> 3) & 0x01010101) * 0xff;
  return (low & ~mask) | (high & mask);
}

__device__ __forceinline__ void scale_min_k(const u8* planes, int s, int r, int& sc, int& mn) {
  if (s < 4) {
    sc = planes[s * 16 + r] & 63;
    mn = planes[(s + 4) * 16 + r] & 63;
  } else {
    const int both = planes[(s + 4) * 16 + r];
    sc = (both & 15) | (planes[(s - 4) * 16 + r] >> 6) << 4;
    mn = (both >> 4) | (planes[s * 16 + r] >> 6) << 4;
  }
}

template <int kType>
__device__ __forceinline__ constexpr int tile_bytes() {
  return kType == kQ4_0 || kType == kIQ4_NL || kType == kQ4_K ? 2304
         : kType == kQ4_1                                     ? 2560
         : kType == kQ5_0 || kType == kQ5_K                   ? 2816
         : kType == kQ5_1                                     ? 3072
         : kType == kQ6_K                                     ? 3328
         : kType == kQ8_0                                     ? 4352
                                                              : 2176;
}

// Block b (of 32 columns) of row r.
template <int kType>
__device__ __forceinline__ void load_block(const u8* band, int cols, int b, int r, Block& out) {
  const int tile_idx = b >> 3, s = b & 7;
  const u8* tile = band + (i64)tile_idx * tile_bytes<kType>();
  if constexpr (kType == kQ6_K) {
    tile += (cols / 256 * 32 + 63) / 64 * 64;
  }
  const int left = cols / 32 - tile_idx * 8;
  const int nb = left < 8 ? left : 8;  // blocks of this tile
  if constexpr (kType == kQ8_0) {
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      out.q[g] = word_at(tile + (s * 8 + g) * 64 + r * 4);
    }
    out.s0 = out.s1 = half_at(tile + nb * 512 + s * 32 + r * 2);
    out.m0 = out.m1 = 0.0f;
    return;
  } else {
    load_nibbles(tile + s * 256, r, out);
  }
  if constexpr (kType == kQ4_K || kType == kQ5_K) {
    const u8* end = tile + (kType == kQ4_K ? 2048 : 2560);
    int sc, mn;
    scale_min_k(end, s, r, sc, mn);
    out.s0 = out.s1 = half_at(end + 192 + r * 2) * sc;
    out.m0 = out.m1 = half_at(end + 224 + r * 2) * mn;
    if constexpr (kType == kQ5_K) {
      const u32 top = word_at(tile + 2048 + s * 64 + r * 4);
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        out.q[p] |= ((top >> p) & 0x01010101) << 4;
      }
    }
  } else if constexpr (kType == kQ6_K) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 top = word_at(tile + 2048 + (2 * s + half) * 64 + r * 4);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        out.q[4 * half + p] |= ((top >> (2 * p)) & 0x03030303) << 4;
      }
    }
    const float d = half_at(band + tile_idx * 32 + r * 2);
    out.s0 = d * (i8)tile[3072 + 2 * s * 16 + r];
    out.s1 = d * (i8)tile[3072 + (2 * s + 1) * 16 + r];
    out.m0 = 32.0f * out.s0;
    out.m1 = 32.0f * out.s1;
  } else if constexpr (kType == kIQ4_XS) {
    const int low = tile[2048 + (s >> 1) * 16 + r] >> (4 * (s & 1)) & 15;
    const int high = *reinterpret_cast<const u16*>(tile + 2144 + r * 2) >> (2 * s) & 3;
    out.s0 = out.s1 = half_at(tile + 2112 + r * 2) * ((low | high << 4) - 32);
    out.m0 = out.m1 = 0.0f;
  } else if constexpr (kType == kQ5_0 || kType == kQ5_1) {
    const u32 top = word_at(tile + nb * 256 + s * 64 + r * 4);
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      out.q[p] |= ((top >> p) & 0x01010101) << 4;
    }
    out.s0 = out.s1 = half_at(tile + nb * 320 + s * 32 + r * 2);
    out.m0 = out.m1 = kType == kQ5_0 ? 16.0f * out.s0 : -half_at(tile + nb * 352 + s * 32 + r * 2);
  } else if constexpr (kType == kMXFP4) {
    const int e = tile[nb * 256 + s * 16 + r];
    out.s0 = out.s1 = e < 2 ? __int_as_float(0x00200000 << e) : __int_as_float((e - 1) << 23);
    out.m0 = out.m1 = 0.0f;
  } else {  // Q4_0, Q4_1, IQ4_NL
    out.s0 = out.s1 = half_at(tile + nb * 256 + s * 32 + r * 2);
    out.m0 = out.m1 = kType == kQ4_0   ? 8.0f * out.s0
                      : kType == kQ4_1 ? -half_at(tile + nb * 288 + s * 32 + r * 2)
                                       : 0.0f;
  }
  if constexpr (kType == kIQ4_NL || kType == kIQ4_XS) {
    // -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113
    const u32 table[4] = {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u};
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      out.q[p] = look_up(out.q[p], table);
    }
  } else if constexpr (kType == kMXFP4) {
    // 0 1 2 3 | 4 6 8 12 | 0 -1 -2 -3 | -4 -6 -8 -12, halves of the E2M1 values
    const u32 table[4] = {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu};
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      out.q[p] = look_up(out.q[p], table);
    }
  }
}

// Sums of rows [first, first + M) over this half warp's blocks.
template <int kType, int M>
__device__ __forceinline__ void dot_band(const u8* band, int cols, const Acts& acts,
                                         const int* rows, int half_warp, int r, float* acc) {
  const int nb = cols / 32;
#pragma unroll 2
  for (int b = half_warp; b < nb; b += kHalfWarps) {
    Block w;
    load_block<kType>(band, cols, b, r, w);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const i64 x = rows != nullptr ? rows[i] : i;
      const int4* q = reinterpret_cast<const int4*>(acts.q + x * cols + b * 32);
      const int4 q0 = __ldg(q), q1 = __ldg(q + 1);
      int dot0 = __dp4a(w.q[0], q0.x, 0), dot1 = __dp4a(w.q[4], q1.x, 0);
      dot0 = __dp4a(w.q[1], q0.y, dot0);
      dot1 = __dp4a(w.q[5], q1.y, dot1);
      dot0 = __dp4a(w.q[2], q0.z, dot0);
      dot1 = __dp4a(w.q[6], q1.z, dot1);
      dot0 = __dp4a(w.q[3], q0.w, dot0);
      dot1 = __dp4a(w.q[7], q1.w, dot1);
      const float sx = __ldg(acts.scale + x * nb + b);
      acc[i] += sx * (w.s0 * dot0 + w.s1 * dot1);
      if constexpr (kType != kQ8_0 && kType != kIQ4_NL && kType != kIQ4_XS && kType != kMXFP4) {
        const float2 sum = __ldg(reinterpret_cast<const float2*>(acts.sum16 + x * 2 * nb) + b);
        acc[i] -= w.m0 * sum.x + w.m1 * sum.y;
      }
    }
  }
}

template <int M>
__device__ __forceinline__ void dot_any(int type, const u8* band, int cols, const Acts& acts,
                                        const int* rows, int half_warp, int r, float* acc) {
  switch (type) {
#define KT_CASE(t) \
  case t:          \
    return dot_band<t, M>(band, cols, acts, rows, half_warp, r, acc);
    KT_TYPES(KT_CASE)
#undef KT_CASE
  }
}

// Adds the partial sums of the half warps in order; thread t < 16 * M returns row t % 16 of input
// t / 16.
template <int M>
__device__ __forceinline__ float reduce_band(float (*part)[M][17], const float* acc) {
  const int half_warp = threadIdx.x >> 4, r = threadIdx.x & 15;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    part[half_warp][i][r] = acc[i];
  }
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x < 16 * M) {
    for (int h = 0; h < kHalfWarps; ++h) {
      sum += part[h][half_warp][r];
    }
  }
  return sum;
}

// Up to three matrices with the same input in one launch (q, k, v). grid.x = all their bands.
struct Outputs {
  Matrix w[3];
  float* out[3];          // [M, rows]
  const float* bias[3];   // [rows] or null
  const float* residual;  // [M, rows] added to out[0], or null
};

template <int M>
__device__ void multiply(const Outputs& p, const Acts& acts) {
  release_next();
  wait_for_previous();
  __shared__ float part[kHalfWarps][M][17];
  int band = blockIdx.x, which = 0;
  while (band >= p.w[which].num_bands) {
    band -= p.w[which++].num_bands;
  }
  const Matrix& w = p.w[which];
  float acc[M] = {};
  dot_any<M>(w.type, w.data + band * w.band_bytes, w.cols, acts, nullptr, threadIdx.x >> 4,
             threadIdx.x & 15, acc);
  float sum = reduce_band<M>(part, acc);
  const int row = band * 16 + (threadIdx.x & 15), i = threadIdx.x >> 4;
  if (i >= M || row >= w.rows) {
    return;
  }
  const i64 at = (i64)i * w.rows + row;
  if (p.bias[which] != nullptr) {
    sum += p.bias[which][row];
  }
  if (which == 0 && p.residual != nullptr) {
    sum += p.residual[at];
  }
  p.out[which][at] = sum;
}

#define KT_MULTIPLY(M)                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads) multiply_##M(Outputs p, Acts x) { \
    multiply<M>(p, x);                                                                     \
  }
KT_MULTIPLY(1)
KT_MULTIPLY(2)
KT_MULTIPLY(3)
KT_MULTIPLY(4)
KT_MULTIPLY(6)
KT_MULTIPLY(8)
KT_MULTIPLY(12)
KT_MULTIPLY(16)

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

// kGroupRows: pairs of one expert computed per pass over its weights; 1 for steps of one token,
// whose experts all differ and which need the registers for loads in flight.
constexpr int kManyRows = 2;

// rows of x for up to kGroupRows pairs, padded with the first.
template <int kGroupRows>
__device__ __forceinline__ int group_rows(const Groups& g, int at, int end, int divisor,
                                          int* rows) {
  const int m = min(kGroupRows, end - at);
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    rows[i] = g.order[at + (i < m ? i : 0)] / divisor;
  }
  return m;
}

// acc = dot products of m <= kGroupRows rows.
template <int kGroupRows>
__device__ __forceinline__ void dot_group(int m, const Matrix& w, int expert, int band,
                                          const Acts& x, const int* rows, float* acc) {
  const u8* data = w.data + expert * w.expert_bytes + band * w.band_bytes;
  const int half_warp = threadIdx.x >> 4, r = threadIdx.x & 15;
  if (kGroupRows > 1 && m > 1) {
    dot_any<kGroupRows>(w.type, data, w.cols, x, rows, half_warp, r, acc);
  } else {
    dot_any<1>(w.type, data, w.cols, x, rows, half_warp, r, acc);
  }
}

// h[pair, I] = silu(gate x) * (up x); grid = (bands of gate, most active experts).
template <int kGroupRows>
__device__ __forceinline__ void gate_up(const Matrix& gate, const Matrix& up, const Acts& x,
                                        const Groups& g, int experts, int top_k, float* h) {
  release_next();
  wait_for_previous();
  __shared__ float part[2][kHalfWarps][kGroupRows][17];
  if (blockIdx.y >= g.active[experts]) {
    return;
  }
  const int expert = g.active[blockIdx.y], end = g.start[expert + 1];
  for (int at = g.start[expert]; at < end; at += kGroupRows) {
    int rows[kGroupRows];
    const int m = group_rows<kGroupRows>(g, at, end, top_k, rows);
    float a[kGroupRows] = {}, b[kGroupRows] = {};
    dot_group<kGroupRows>(m, gate, expert, blockIdx.x, x, rows, a);
    dot_group<kGroupRows>(m, up, expert, blockIdx.x, x, rows, b);
    const float gated = reduce_band<kGroupRows>(part[0], a);
    const float value = reduce_band<kGroupRows>(part[1], b);
    const int i = threadIdx.x >> 4, row = blockIdx.x * 16 + (threadIdx.x & 15);
    if (i < m && row < gate.rows) {
      h[(i64)g.order[at + i] * gate.rows + row] = gated / (1.0f + __expf(-gated)) * value;
    }
    __syncthreads();
  }
}

// y[pair, H] = down h[pair]; grid = (bands of down, most active experts).
template <int kGroupRows>
__device__ __forceinline__ void down_rows(const Matrix& down, const Acts& h, const Groups& g,
                                          int experts, float* y) {
  release_next();
  wait_for_previous();
  __shared__ float part[kHalfWarps][kGroupRows][17];
  if (blockIdx.y >= g.active[experts]) {
    return;
  }
  const int expert = g.active[blockIdx.y], end = g.start[expert + 1];
  for (int at = g.start[expert]; at < end; at += kGroupRows) {
    int rows[kGroupRows];
    const int m = group_rows<kGroupRows>(g, at, end, 1, rows);
    float acc[kGroupRows] = {};
    dot_group<kGroupRows>(m, down, expert, blockIdx.x, h, rows, acc);
    const float sum = reduce_band<kGroupRows>(part, acc);
    const int i = threadIdx.x >> 4, row = blockIdx.x * 16 + (threadIdx.x & 15);
    if (i < m && row < down.rows) {
      y[(i64)rows[i] * down.rows + row] = sum;
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 4)
    experts_gate_up_1(Matrix gate, Matrix up, Acts x, Groups g, int experts, int top_k, float* h) {
  gate_up<1>(gate, up, x, g, experts, top_k, h);
}
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    experts_gate_up_2(Matrix gate, Matrix up, Acts x, Groups g, int experts, int top_k, float* h) {
  gate_up<kManyRows>(gate, up, x, g, experts, top_k, h);
}
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    experts_down_1(Matrix down, Acts h, Groups g, int experts, float* y) {
  down_rows<1>(down, h, g, experts, y);
}
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    experts_down_2(Matrix down, Acts h, Groups g, int experts, float* y) {
  down_rows<kManyRows>(down, h, g, experts, y);
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

// logits[t, e] = x[t] . w[e] in f32, the same additions whatever the number of rows; one warp per
// (expert, token). Rows of w: f32 row-major (routers are small and stay exact).
extern "C" __global__ void router_logits(const float* x, const float* w, int cols, int experts,
                                         float* logits) {
  release_next();
  wait_for_previous();
  const int e = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (e >= experts) {
    return;
  }
  const float4* a = reinterpret_cast<const float4*>(x + (i64)blockIdx.y * cols);
  const float4* b = reinterpret_cast<const float4*>(w + (i64)e * cols);
  float sum = 0.0f;
#pragma unroll 4
  for (int i = lane; i < cols / 4; i += 32) {
    const float4 p = a[i], q = b[i];
    sum += p.x * q.x + p.y * q.y + p.z * q.z + p.w * q.w;
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, s);
  }
  if (lane == 0) {
    logits[(i64)blockIdx.y * experts + e] = sum;
  }
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <int kType>
__device__ __forceinline__ void dequantize_block(const u8* band, int cols, int b, int r, u16* out) {
  Block w;
  load_block<kType>(band, cols, b, r, w);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float s = i < 4 ? w.s0 : w.s1, m = i < 4 ? w.m0 : w.m1;
    u32 packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int q = w.q[i + j / 2], shift = 16 * (j & 1);
      packed[j] = bf16_pair(s * (i8)(q >> shift) - m, s * (i8)(q >> (shift + 8)) - m);
    }
    reinterpret_cast<uint4*>(out)[i / 2] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

__device__ __forceinline__ void dequantize_any(int type, const u8* band, int cols, int b, int r,
                                               u16* out) {
  switch (type) {
#define KT_CASE(t) \
  case t:          \
    return dequantize_block<t>(band, cols, b, r, out);
    KT_TYPES(KT_CASE)
#undef KT_CASE
  }
}

// out bf16 [experts, rows, cols]; grid = (bands, experts). Rows beyond the matrix are not written.
extern "C" __global__ void __launch_bounds__(kThreads) dequantize(Matrix w, u16* out) {
  release_next();
  wait_for_previous();
  const u8* band = w.data + blockIdx.y * w.expert_bytes + blockIdx.x * w.band_bytes;
  const int r = threadIdx.x & 15, row = blockIdx.x * 16 + r;
  if (row >= w.rows) {
    return;
  }
  u16* to = out + ((i64)blockIdx.y * w.rows + row) * w.cols;
  for (int b = threadIdx.x >> 4; b < w.cols / 32; b += kHalfWarps) {
    dequantize_any(w.type, band, w.cols, b, r, to + 32 * b);
  }
}
