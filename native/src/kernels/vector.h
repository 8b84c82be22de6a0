// vector.h: element-wise and attention kernels, one table per ISA (vector_<isa>.cpp).
//
// Every kernel works in groups of 16 floats on every ISA, so that the order of additions, and with
// it the result up to the rounding of fused multiply-adds, is the same everywhere. A result never
// depends on how many rows are handled in one call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

inline constexpr int kLanes = 16;
// Positions per step of the online softmax. KV pages are multiples of 16 positions, so a block is
// made of four groups that may lie in different pages.
inline constexpr int kGroupPositions = 16;
inline constexpr int kBlockGroups = 4;
inline constexpr int kBlockPositions = kGroupPositions * kBlockGroups;

// One block of keys and values against m query rows that share the KV head.
struct AttendBlock {
  const float* q;               // [m, head_dim], already scaled
  const void* k[kBlockGroups];  // each [head_dim, 16]: position is the fast index
  const void* v[kBlockGroups];  // each [16, padded_dim]
  const int32_t* limits;        // [m] how many positions of this block each row may see, <= 0: none
  float* max;                   // [m] running maximum, -inf at the start
  float* sum;                   // [m] running sum of exp(score - max)
  float* acc;                   // [m, padded_dim] running sum of exp(score - max) * v
  float* scores;                // scratch [m, 64]
  int32_t m;
  int32_t head_dim;
  int32_t padded_dim;     // head_dim rounded up to 16; the padding of v is zero
  int32_t num_positions;  // valid positions of the block, 1 .. 64; the rest is not read as v
  int32_t kv_type;        // KT_KV_x
  int32_t reserved;
};

struct VectorKernels {
  int32_t isa;
  // out = x / sqrt(mean(x^2) + eps) * weight. out may be x.
  void (*rms_norm)(const float* x, const float* weight, int32_t n, float eps, float* out);
  // out = gate * sigmoid(gate) * up. out may be gate or up.
  void (*silu_mul)(const float* gate, const float* up, int32_t n, float* out);
  // out = a + scale * b. out may be a or b.
  void (*add_scaled)(const float* a, float scale, const float* b, int32_t n, float* out);
  // One band's sums into many rows: to + rows[i] * stride gets factors[i] * sums[i * sums_stride +
  // c], c < n <= 16.
  void (*add_band)(float* to, int64_t stride, const int32_t* rows, const float* factors,
                   const float* sums, int64_t sums_stride, int32_t m, int32_t n);
  // x = x * scale
  void (*scale)(float* x, float scale, int32_t n);
  // In place over the first 2 * half values: pairs (i, i + half) when neox, else (2i, 2i + 1).
  void (*rope)(float* x, const float* cos, const float* sin, int32_t half, int32_t neox);
  // out[i * out_stride + r] = dot(w row r, x row i) over n columns.
  void (*dot_rows)(const float* w, int64_t w_stride, int32_t num_rows, const float* x,
                   int64_t x_stride, int32_t m, int32_t n, float* out, int64_t out_stride);
  // x = exp(x - max(x)) / sum
  void (*softmax)(float* x, int32_t n);
  // One key into lane `lane` of a [head_dim, 16] group; one value row (padding zeroed).
  void (*store_k)(int32_t kv_type, const float* k, int32_t head_dim, int32_t lane, void* group);
  void (*store_v)(int32_t kv_type, const float* v, int32_t head_dim, int32_t padded_dim, void* row);
  void (*attend)(const AttendBlock& block);
  // Merges a finished segment (max, sum, acc) into a running total; both as in AttendBlock.
  void (*merge)(float* max, float* sum, float* acc, float part_max, float part_sum,
                const float* part_acc, int32_t n);
  // Largest value and its lowest index; NaN counts as -inf. n >= 1.
  int32_t (*argmax)(const float* x, int32_t n, float* max);
  // Sum of exp((x - max) * scale); with out != nullptr the terms are stored too.
  double (*sum_exp)(const float* x, int32_t n, float max, float scale, float* out);
};

// nullptr when this build lacks the ISA. ISAs without a table of their own share the next lower.
const VectorKernels* vector_kernels(int32_t isa);

// The tables; vector_kernels() is the only caller.
extern const VectorKernels kVectorScalar;
#if defined(__x86_64__)
extern const VectorKernels kVectorAvx2;
extern const VectorKernels kVectorAvx512;
#endif

}  // namespace kt
