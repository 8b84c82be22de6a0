// types.cpp: the table of tensor types and the exact decoders of their blocks.
//
// Compiled with -ffp-contract=off: a fused multiply-add would differ from gguf's reference.
#include <cstring>

#include "kernels/blocks.h"
#include "kernels/kernels.h"
#include "kernels/types_iq.h"

namespace kt {
namespace {

constexpr TypeTraits kTypes[] = {
    {kF32, "F32", 1, 4, 2},
    {kF16, "F16", 1, 2, 2},
    {kQ4_0, "Q4_0", 32, 18, 2},
    {kQ4_1, "Q4_1", 32, 20, 2},
    {kQ5_0, "Q5_0", 32, 22, 2},
    {kQ5_1, "Q5_1", 32, 24, 2},
    {kQ8_0, "Q8_0", 32, 34, 2},
    {kQ2_K, "Q2_K", 256, 84, 2},
    {kQ3_K, "Q3_K", 256, 110, 2},
    {kQ4_K, "Q4_K", 256, 144, 2},
    {kQ5_K, "Q5_K", 256, 176, 2},
    {kQ6_K, "Q6_K", 256, 210, 2},
    {kIQ2_XXS, "IQ2_XXS", 256, 66, 1},
    {kIQ2_XS, "IQ2_XS", 256, 74, 1},
    {kIQ3_XXS, "IQ3_XXS", 256, 98, 1},
    {kIQ1_S, "IQ1_S", 256, 50, 1},
    {kIQ4_NL, "IQ4_NL", 32, 18, 2},
    {kIQ3_S, "IQ3_S", 256, 110, 1},
    {kIQ2_S, "IQ2_S", 256, 82, 1},
    {kIQ4_XS, "IQ4_XS", 256, 136, 2},
    {kIQ1_M, "IQ1_M", 256, 56, 1},
    {kBF16, "BF16", 1, 2, 2},
    {kTQ1_0, "TQ1_0", 256, 54, 1},
    {kTQ2_0, "TQ2_0", 256, 66, 1},
    {kMXFP4, "MXFP4", 32, 17, 2},
};

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

uint16_t load16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}
uint32_t load32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}
float load_half(const uint8_t* p) { return half_to_float(load16(p)); }
float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// E8M0 exponent halved (the MXFP4 values are doubled): 2^(e - 128), subnormal below e = 2.
float e8m0_half(uint8_t e) {
  return bits_to_float(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

void set_scales(DecodedBlock* out, int first, int count, float scale, float min) {
  for (int i = first; i < first + count; ++i) {
    out->scale[i] = scale;
    out->min[i] = min;
  }
}

// Element k of a 32-block: low nibbles are k = 0..15, high nibbles 16..31.
int nibble32(const uint8_t* qs, int k) { return k < 16 ? qs[k] & 15 : qs[k - 16] >> 4; }

// 2-bit values of a 256-block, less `offset`: 128 columns share 32 bytes.
void move_pairs(const uint8_t* qs, int offset, int8_t* q) {
  for (int half = 0; half < 2; ++half) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int l = 0; l < 32; ++l) {
        q[128 * half + 32 * quarter + l] =
            static_cast<int8_t>(((qs[32 * half + l] >> (2 * quarter)) & 3) - offset);
      }
    }
  }
}

// Nibbles of a Q4_K or Q5_K block: 64 columns share 32 bytes.
void move_nibbles(const uint8_t* qs, int8_t* q) {
  for (int part = 0; part < 4; ++part) {
    for (int l = 0; l < 32; ++l) {
      q[64 * part + l] = static_cast<int8_t>(qs[32 * part + l] & 15);
      q[64 * part + 32 + l] = static_cast<int8_t>(qs[32 * part + l] >> 4);
    }
  }
}

void decode_q4_0(const uint8_t* b, DecodedBlock* out) {
  for (int k = 0; k < 32; ++k) {
    out->q[k] = static_cast<int8_t>(nibble32(b + 2, k) - 8);
  }
  set_scales(out, 0, 2, load_half(b), 0.0f);
}

void decode_q4_1(const uint8_t* b, DecodedBlock* out) {
  for (int k = 0; k < 32; ++k) {
    out->q[k] = static_cast<int8_t>(nibble32(b + 4, k));
  }
  set_scales(out, 0, 2, load_half(b), -load_half(b + 2));
}

void decode_q5(const uint8_t* b, const uint8_t* high, int offset, float min, DecodedBlock* out) {
  const uint32_t bits = load32(high);
  for (int k = 0; k < 32; ++k) {
    const int q = nibble32(high + 4, k) | static_cast<int>((bits >> k) & 1) << 4;
    out->q[k] = static_cast<int8_t>(q - offset);
  }
  set_scales(out, 0, 2, load_half(b), min);
}

void decode_q8_0(const uint8_t* b, DecodedBlock* out) {
  std::memcpy(out->q, b + 2, 32);
  set_scales(out, 0, 2, load_half(b), 0.0f);
}

void decode_q2_k(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b + 80), dmin = load_half(b + 82);
  move_pairs(b + 16, 0, out->q);
  for (int i = 0; i < 16; ++i) {
    out->scale[i] = d * static_cast<float>(b[i] & 15);
    out->min[i] = dmin * static_cast<float>(b[i] >> 4);
  }
}

void decode_q3_k(const uint8_t* b, DecodedBlock* out) {
  const uint8_t* scales = b + 96;
  const float d = load_half(b + 108);
  move_pairs(b + 32, 4, out->q);
  for (int j = 0; j < 8; ++j) {  // bit j of mask byte l adds 4 to column 32 j + l
    for (int l = 0; l < 32; ++l) {
      out->q[32 * j + l] = static_cast<int8_t>(out->q[32 * j + l] + ((b[l] >> j) & 1) * 4);
    }
  }
  for (int i = 0; i < 16; ++i) {
    const int low = (scales[i % 8] >> (4 * (i / 8))) & 15;
    const int high = (scales[8 + i % 4] >> (2 * (i / 4))) & 3;
    out->scale[i] = d * static_cast<float>((low | high << 4) - 32);
    out->min[i] = 0.0f;
  }
}

// The 6-bit scales and mins of Q4_K and Q5_K, 12 bytes for 8 sub-blocks of 32.
void decode_k_scales(const uint8_t* s, float d, float dmin, DecodedBlock* out) {
  for (int j = 0; j < 8; ++j) {
    const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    const int min = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6) << 4;
    set_scales(out, 2 * j, 2, d * static_cast<float>(scale), dmin * static_cast<float>(min));
  }
}

void decode_q4_k(const uint8_t* b, DecodedBlock* out) {
  move_nibbles(b + 16, out->q);
  decode_k_scales(b + 4, load_half(b), load_half(b + 2), out);
}

void decode_q5_k(const uint8_t* b, DecodedBlock* out) {
  const uint8_t* high = b + 16;
  move_nibbles(b + 48, out->q);
  for (int j = 0; j < 8; ++j) {  // bit j of high byte l is bit 4 of column 32 j + l
    for (int l = 0; l < 32; ++l) {
      out->q[32 * j + l] = static_cast<int8_t>(out->q[32 * j + l] | ((high[l] >> j) & 1) << 4);
    }
  }
  decode_k_scales(b + 4, load_half(b), load_half(b + 2), out);
}

void decode_q6_k(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* low = b + 64 * half;
    const uint8_t* high = b + 128 + 32 * half;
    for (int quarter = 0; quarter < 4; ++quarter) {
      int8_t* q = out->q + 128 * half + 32 * quarter;
      for (int l = 0; l < 32; ++l) {
        const int nibble = (low[(quarter & 1) * 32 + l] >> (4 * (quarter >> 1))) & 15;
        q[l] = static_cast<int8_t>((nibble | ((high[l] >> (2 * quarter)) & 3) << 4) - 32);
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    out->scale[i] = d * static_cast<float>(static_cast<int8_t>(b[192 + i]));
    out->min[i] = 0.0f;
  }
}

void decode_iq4_nl(const uint8_t* b, DecodedBlock* out) {
  for (int k = 0; k < 32; ++k) {
    out->q[k] = kIq4Values[nibble32(b + 2, k)];
  }
  set_scales(out, 0, 2, load_half(b), 0.0f);
}

void decode_iq4_xs(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  const uint32_t high = load16(b + 2);
  for (int j = 0; j < 8; ++j) {
    const int low = (b[4 + j / 2] >> (4 * (j & 1))) & 15;
    const int scale = (low | static_cast<int>((high >> (2 * j)) & 3) << 4) - 32;
    set_scales(out, 2 * j, 2, d * static_cast<float>(scale), 0.0f);
    for (int k = 0; k < 32; ++k) {
      out->q[32 * j + k] = kIq4Values[nibble32(b + 8 + 16 * j, k)];
    }
  }
}

void decode_mxfp4(const uint8_t* b, DecodedBlock* out) {
  for (int k = 0; k < 32; ++k) {
    out->q[k] = kMxfp4Values[nibble32(b + 1, k)];
  }
  set_scales(out, 0, 2, e8m0_half(b[0]), 0.0f);
}

// Five base-3 digits a byte (four in the last bytes), most significant first, as a fraction of 256.
int ternary(uint8_t byte, int digit) {
  constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
  const auto shifted = static_cast<uint8_t>(byte * kPowers[digit]);
  return (shifted * 3 >> 8) - 1;
}

void decode_tq1_0(const uint8_t* b, DecodedBlock* out) {
  for (int k = 0; k < 160; ++k) {
    out->q[k] = static_cast<int8_t>(ternary(b[k % 32], k / 32));
  }
  for (int k = 0; k < 80; ++k) {
    out->q[160 + k] = static_cast<int8_t>(ternary(b[32 + k % 16], k / 16));
  }
  for (int k = 0; k < 16; ++k) {
    out->q[240 + k] = static_cast<int8_t>(ternary(b[48 + k % 4], k / 4));
  }
  set_scales(out, 0, 16, load_half(b + 52), 0.0f);
}

void decode_tq2_0(const uint8_t* b, DecodedBlock* out) {
  move_pairs(b, 1, out->q);
  set_scales(out, 0, 16, load_half(b + 64), 0.0f);
}

}  // namespace

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in f32
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return bits_to_float(sign | wide << 23 | fraction << 13);
}

const TypeTraits* type_traits(int32_t type) {
  for (const TypeTraits& traits : kTypes) {
    if (traits.type == type) {
      return &traits;
    }
  }
  return nullptr;
}

void decode_block(int32_t type, const uint8_t* block, DecodedBlock* out) {
  switch (type) {
    case kQ4_0:
      return decode_q4_0(block, out);
    case kQ4_1:
      return decode_q4_1(block, out);
    case kQ5_0:
      return decode_q5(block, block + 2, 16, 0.0f, out);
    case kQ5_1:
      return decode_q5(block, block + 4, 0, -load_half(block + 2), out);
    case kQ8_0:
      return decode_q8_0(block, out);
    case kQ2_K:
      return decode_q2_k(block, out);
    case kQ3_K:
      return decode_q3_k(block, out);
    case kQ4_K:
      return decode_q4_k(block, out);
    case kQ5_K:
      return decode_q5_k(block, out);
    case kQ6_K:
      return decode_q6_k(block, out);
    case kIQ2_XXS:
      return decode_iq2_xxs(block, out);
    case kIQ2_XS:
      return decode_iq2_xs(block, out);
    case kIQ2_S:
      return decode_iq2_s(block, out);
    case kIQ3_XXS:
      return decode_iq3_xxs(block, out);
    case kIQ3_S:
      return decode_iq3_s(block, out);
    case kIQ1_S:
      return decode_iq1_s(block, out);
    case kIQ1_M:
      return decode_iq1_m(block, out);
    case kTQ1_0:
      return decode_tq1_0(block, out);
    case kIQ4_NL:
      return decode_iq4_nl(block, out);
    case kIQ4_XS:
      return decode_iq4_xs(block, out);
    case kMXFP4:
      return decode_mxfp4(block, out);
    case kTQ2_0:
      return decode_tq2_0(block, out);
    default:
      return;
  }
}

void dequantize_row(int32_t type, const uint8_t* src, int64_t num_weights, float* dst) {
  if (type == kF32) {
    std::memcpy(dst, src, static_cast<size_t>(num_weights) * 4);
  } else if (type == kF16) {
    for (int64_t i = 0; i < num_weights; ++i) {
      dst[i] = load_half(src + 2 * i);
    }
  } else if (type == kBF16) {
    for (int64_t i = 0; i < num_weights; ++i) {
      dst[i] = bits_to_float(static_cast<uint32_t>(load16(src + 2 * i)) << 16);
    }
  } else {
    const TypeTraits* traits = type_traits(type);
    DecodedBlock block;
    for (int64_t first = 0; first < num_weights; first += traits->block_size) {
      decode_block(type, src, &block);
      for (int k = 0; k < traits->block_size; ++k) {
        dst[first + k] = block.scale[k / 16] * static_cast<float>(block.q[k]) - block.min[k / 16];
      }
      src += traits->block_bytes;
    }
  }
}

}  // namespace kt
