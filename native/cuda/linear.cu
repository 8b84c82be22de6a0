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

// h[pair, I] = silu(gate x) * (up x) for the (token, expert) pairs of a step.
// grid = (bands of gate, pairs); expert_of[pair] < 0 means: somebody else computes this pair.
extern "C" __global__ void __launch_bounds__(kThreads)
    experts_gate_up(Matrix gate, Matrix up, Acts x, const int* expert_of, int top_k, float* h) {
  __shared__ float part[2][kHalfWarps][1][17];
  const int pair = blockIdx.y, expert = expert_of[pair], token = pair / top_k;
  if (expert < 0) {
    return;
  }
  const int half_warp = threadIdx.x >> 4, r = threadIdx.x & 15;
  float g = 0.0f, u = 0.0f;
  const i64 at = (i64)blockIdx.x;
  dot_any<1>(gate.type, gate.data + expert * gate.expert_bytes + at * gate.band_bytes, gate.cols, x,
             &token, half_warp, r, &g);
  dot_any<1>(up.type, up.data + expert * up.expert_bytes + at * up.band_bytes, up.cols, x, &token,
             half_warp, r, &u);
  g = reduce_band<1>(part[0], &g);
  u = reduce_band<1>(part[1], &u);
  const int row = blockIdx.x * 16 + r;
  if (half_warp == 0 && row < gate.rows) {
    h[(i64)pair * gate.rows + row] = g / (1.0f + __expf(-g)) * u;
  }
}

// out[t, H] = residual + sum over k of weight[t, k] * (down h[t, k]); grid = (bands of down, T).
extern "C" __global__ void __launch_bounds__(kThreads)
    experts_down(Matrix down, Acts h, const int* expert_of, const float* weight, int top_k,
                 const float* residual, float* out) {
  __shared__ float part[kHalfWarps][1][17];
  const int token = blockIdx.y, half_warp = threadIdx.x >> 4, r = threadIdx.x & 15;
  float total = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    const int pair = token * top_k + k, expert = expert_of[pair];
    if (expert < 0) {
      continue;
    }
    float acc = 0.0f;
    dot_any<1>(down.type, down.data + expert * down.expert_bytes + blockIdx.x * down.band_bytes,
               down.cols, h, &pair, half_warp, r, &acc);
    total += weight[pair] * acc;
  }
  const float sum = reduce_band<1>(part, &total);
  const int row = blockIdx.x * 16 + r;
  if (half_warp != 0 || row >= down.rows) {
    return;
  }
  const i64 at = (i64)token * down.rows + row;
  out[at] = sum + (residual != nullptr ? residual[at] : 0.0f);
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
