// matrix_scalar.cpp: the reference kernels, for every type and every CPU.
//
// Weights are decoded to (int8, scale, min) per 16 columns exactly as gguf does; a 32-block adds
//     scale_x * (s0 * dot0 + s1 * dot1) - (m0 * sum0 + m1 * sum1)
// in f32, blocks in order, where dot0, dot1 are exact integer sums of 16 columns. The vector
// kernels compute the same integers and round the f32 part in their own fixed order.
#include <math.h>

#include <cstring>

#include "kernels/kernels.h"
#include "kernels/layout.h"
#include "kernels/pack.h"

namespace kt {
namespace {

void prepare_q8(const float* x, int32_t cols, int32_t first, int32_t count, uint8_t* dst) {
  const ActLayout at = act_layout(cols);
  for (int32_t start = 0; start < count; start += 32) {
    const int32_t b = (first + start) / 32;
    const int32_t width = count - start < 32 ? count - start : 32;
    float largest = 0.0f;
    for (int32_t k = 0; k < width; ++k) {
      const float value = fabsf(x[start + k]);
      largest = value > largest || value != value ? value : largest;
      if (largest != largest) {
        break;  // NaN: the scale carries it
      }
    }
    const float inverse = largest == 0.0f ? 0.0f : 127.0f / largest;
    const float scale = largest / 127.0f;
    int8_t q[32] = {};
    int32_t sums[2] = {};
    for (int32_t k = 0; k < width; ++k) {
      const float value = x[start + k] * inverse;
      q[k] = fabsf(value) <= 127.5f ? static_cast<int8_t>(lrintf(value)) : int8_t{0};
      sums[k / 16] += q[k];
    }
    const int32_t off32[2] = {-32 * sums[0], -32 * sums[1]};
    const int32_t off128 = -128 * (sums[0] + sums[1]);
    const float sum16[2] = {scale * static_cast<float>(sums[0]),
                            scale * static_cast<float>(sums[1])};
    const float sum = scale * static_cast<float>(sums[0] + sums[1]);
    std::memcpy(dst + 32 * b, q, 32);
    std::memcpy(dst + at.scale + 4 * b, &scale, 4);
    std::memcpy(dst + at.sum + 4 * b, &sum, 4);
    std::memcpy(dst + at.off128 + 4 * b, &off128, 4);
    std::memcpy(dst + at.off32 + 8 * b, off32, 8);
    std::memcpy(dst + at.sum16 + 8 * b, sum16, 8);
  }
}

void prepare(ActKind kind, const float* x, int32_t cols, int32_t first, int32_t count,
             uint8_t* dst) {
  if (kind == kActQ8) {
    return prepare_q8(x, cols, first, count, dst);
  }
  std::memcpy(dst + 4 * static_cast<int64_t>(first), x, static_cast<size_t>(count) * 4);
  if (first + count == cols) {  // the tail of the last vector is read by the vector kernels
    const int64_t used = 4 * static_cast<int64_t>(cols);
    std::memset(dst + used, 0, static_cast<size_t>(align_up(used, 64) - used));
  }
}

// Row r of an F32, F16 or BF16 band as f32.
void load_float_row(const Matrix& w, const uint8_t* band, int32_t r, float* dst) {
  for (int64_t k = 0; k < w.cols; ++k) {
    const uint8_t* from = w.type == kF32   ? band + 64 * k + 4 * r
                          : w.type == kF16 ? band + 32 * k + 2 * r
                                           : band + 64 * (k / 2) + 4 * r + 2 * (k & 1);
    dequantize_row(w.type, from, 1, dst + k);
  }
}

void multiply_float(const Matrix& w, const uint8_t* band, const uint8_t* acts, int64_t act_stride,
                    const int32_t* rows, int32_t m, float* out, int64_t out_stride, float* row) {
  for (int32_t r = 0; r < kBandRows; ++r) {
    load_float_row(w, band, r, row);
    for (int32_t i = 0; i < m; ++i) {
      const auto* x =
          reinterpret_cast<const float*>(acts + (rows != nullptr ? rows[i] : i) * act_stride);
      float even = 0.0f, odd = 0.0f;
      int32_t k = 0;
      for (; k + 1 < w.cols; k += 2) {
        even += row[k] * x[k];
        odd += row[k + 1] * x[k + 1];
      }
      if (k < w.cols) {
        even += row[k] * x[k];
      }
      out[i * out_stride + r] = even + odd;
    }
  }
}

// Adds the contribution of columns [256 tile, ...) of one row to one output.
float add_tile(const DecodedBlock& w, int32_t first_block, int32_t num_blocks, const uint8_t* x,
               const ActLayout& at, float total) {
  for (int32_t b = 0; b < num_blocks; ++b) {
    int8_t q[32];
    float scale, sum16[2];
    std::memcpy(q, x + 32 * (first_block + b), 32);
    std::memcpy(&scale, x + at.scale + 4 * (first_block + b), 4);
    std::memcpy(sum16, x + at.sum16 + 8 * (first_block + b), 8);
    int32_t dot[2] = {};
    for (int k = 0; k < 32; ++k) {
      dot[k / 16] += w.q[32 * b + k] * q[k];
    }
    const float* s = w.scale + 2 * b;
    const float* low = w.min + 2 * b;
    total += scale * (s[0] * static_cast<float>(dot[0]) + s[1] * static_cast<float>(dot[1]));
    total -= low[0] * sum16[0] + low[1] * sum16[1];
  }
  return total;
}

// One row's tile decoded to a 256-wide block (32-block types are put together).
void decode_tile(const Matrix& w, const uint8_t* band, int32_t tile, int32_t row, int32_t num_cols,
                 DecodedBlock* out) {
  const TypeTraits* traits = type_traits(w.type);
  uint8_t raw[8 * 34];
  const uint8_t* src = raw;
  if (has_tiles(w.type)) {
    unpack_tile(w.type, w.cols, band, tile, row, raw);
  } else {
    src = band + (int64_t{tile} * kBandRows + row) * traits->block_bytes;
  }
  if (traits->block_size == kTileCols) {
    return decode_block(w.type, src, out);
  }
  for (int32_t b = 0; b < num_cols / 32; ++b) {
    DecodedBlock part;
    decode_block(w.type, src + b * traits->block_bytes, &part);
    std::memcpy(out->q + 32 * b, part.q, 32);
    std::memcpy(out->scale + 2 * b, part.scale, 8);
    std::memcpy(out->min + 2 * b, part.min, 8);
  }
}

void multiply_q8(const Matrix& w, const uint8_t* band, const uint8_t* acts, int64_t act_stride,
                 const int32_t* rows, int32_t m, float* out, int64_t out_stride,
                 DecodedBlock* decoded) {
  const ActLayout at = act_layout(w.cols);
  for (int32_t i = 0; i < m; ++i) {
    for (int32_t r = 0; r < kBandRows; ++r) {
      out[i * out_stride + r] = 0.0f;
    }
  }
  for (int32_t tile = 0; tile * kTileCols < w.cols; ++tile) {
    const int32_t left = w.cols - tile * kTileCols;
    const int32_t num_cols = left < kTileCols ? left : kTileCols;
    for (int32_t r = 0; r < kBandRows; ++r) {
      decode_tile(w, band, tile, r, num_cols, decoded);
      for (int32_t i = 0; i < m; ++i) {
        const uint8_t* x = acts + (rows != nullptr ? rows[i] : i) * act_stride;
        float* total = out + i * out_stride + r;
        *total = add_tile(*decoded, tile * 8, num_cols / 32, x, at, *total);
      }
    }
  }
}

void multiply_band(const Matrix& w, int32_t expert, int32_t band, const uint8_t* acts,
                   int64_t act_stride, const int32_t* rows, int32_t m, float* out,
                   int64_t out_stride, void* scratch, const uint8_t* /*next*/) {
  const uint8_t* data = band_at(w, expert, band);
  if (w.act == kActF32) {
    multiply_float(w, data, acts, act_stride, rows, m, out, out_stride,
                   static_cast<float*>(scratch));
  } else {
    multiply_q8(w, data, acts, act_stride, rows, m, out, out_stride,
                static_cast<DecodedBlock*>(scratch));
  }
}

// One rounding per step, as many chains as a plain core has use for.
int64_t peak(int32_t kind, int64_t rounds) {
  if (kind != 2) {
    return 0;
  }
  float sum[8] = {};
  volatile float factor = 0.5f;
  const float value = factor;
  for (int64_t round = 0; round < rounds; ++round) {
    for (float& s : sum) {
      s += value * s;
    }
  }
  for (const float s : sum) {
    factor = s;
  }
  return 8 * rounds;
}

constexpr MatrixKernels kKernels = {0, prepare, multiply_band, nullptr, peak};

}  // namespace

const MatrixKernels* matrix_kernels_scalar() { return &kKernels; }

}  // namespace kt
