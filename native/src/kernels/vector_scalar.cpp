// Vector kernels in plain C++: the reference, and the only table on other CPUs.
#include "kernels/vector.h"
#include "kt.h"

namespace kt {
namespace {

struct Vec {
  float v[kLanes];
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

#define KT_LANES(expression)                              \
  Vec r;                                                  \
  for (int i = 0; i < kLanes; ++i) r.v[i] = (expression); \
  return r

inline Vec set1(float x) { KT_LANES(x); }
inline Vec load(const float* p) { KT_LANES(p[i]); }
inline Vec load_part(const float* p, int n, float rest) { KT_LANES(i < n ? p[i] : rest); }
inline void store(float* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) {
    p[i] = x.v[i];
  }
}
inline void store_part(float* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) {
    p[i] = x.v[i];
  }
}
inline Vec add(Vec a, Vec b) { KT_LANES(a.v[i] + b.v[i]); }
inline Vec sub(Vec a, Vec b) { KT_LANES(a.v[i] - b.v[i]); }
inline Vec mul(Vec a, Vec b) { KT_LANES(a.v[i] * b.v[i]); }
inline Vec div(Vec a, Vec b) { KT_LANES(a.v[i] / b.v[i]); }
inline Vec fma(Vec a, Vec b, Vec c) { KT_LANES(a.v[i] * b.v[i] + c.v[i]); }
// The second operand when either is NaN, as the x86 instruction.
inline Vec max(Vec a, Vec b) { KT_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Vec min(Vec a, Vec b) { KT_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Vec round_even(Vec a) {
  // Adding 1.5 * 2^23 leaves no fraction bits; exact for |a| < 2^22, which exp guarantees.
  KT_LANES((a.v[i] + 12582912.0f) - 12582912.0f);
}
// value * 2^n for integral n in [-126, 127]
inline Vec scale2(Vec a, Vec n) {
  KT_LANES(a.v[i] * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23));
}
// a < b ? x : y per lane
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) { KT_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
// Lanes at or above n become rest.
inline Vec keep_first(Vec a, int n, Vec rest) { KT_LANES(i < n ? a.v[i] : rest.v[i]); }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 0x1f;
  const uint32_t mantissa = h & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return bits_to_float(float_to_bits(value) | sign);
  }
  if (exponent == 31) {
    return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00);
  }
  if (magnitude >= 0x477ff000u) {
    return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  }
  if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 do the rounding
    const float sum = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(sum) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude + 0xc8000fffu + odd) >> 13));
}

inline Vec load_f16(const uint16_t* p) { KT_LANES(half_to_float(p[i])); }
inline Vec load_bf16(const uint16_t* p) {
  KT_LANES(bits_to_float(static_cast<uint32_t>(p[i]) << 16));
}

inline float reduce_add(Vec a) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) {
      a.v[i] += a.v[i + step];
    }
  }
  return a.v[0];
}
inline float reduce_max(Vec a) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) {
      a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
    }
  }
  return a.v[0];
}
// Bit i set where a[i] == b[i].
inline uint32_t equal_mask(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) {
    mask |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
  }
  return mask;
}

#undef KT_LANES

// A group of 16 floats takes four of the baseline's registers.
constexpr bool kManyRegisters = false;

#define KT_VECTOR_ISA KT_ISA_SCALAR
#include "kernels/vector_body.inl"
#undef KT_VECTOR_ISA

}  // namespace

const VectorKernels kVectorScalar = kTable;

}  // namespace kt
