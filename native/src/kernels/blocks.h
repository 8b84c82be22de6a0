// blocks.h: the GGUF block formats: ggml's type numbers, sizes and how a block turns into integers.
//
// Every quantised type is decoded to the same shape: weight k of a block is
//     scale[k / 16] * q[k] - min[k / 16],   q an int8, one scale and min per 16 weights,
// which is what gguf's reference computes (same operations in the same order), so that one decoder
// per type serves dequantisation, the scalar kernel and the unpacking of the types without their
// own fast layout. Blocks are read as bytes: GGUF data need not be aligned.
#pragma once

#include <cstdint>

namespace kt {

enum GgmlType : int32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ2_XXS = 16,
  kIQ2_XS = 17,
  kIQ3_XXS = 18,
  kIQ1_S = 19,
  kIQ4_NL = 20,
  kIQ3_S = 21,
  kIQ2_S = 22,
  kIQ4_XS = 23,
  kIQ1_M = 29,
  kBF16 = 30,
  kTQ1_0 = 34,
  kTQ2_0 = 35,
  kMXFP4 = 39,
};

inline constexpr int kMaxBlock = 256;

// One decoded block of up to 256 weights.
struct DecodedBlock {
  int8_t q[kMaxBlock];
  float scale[kMaxBlock / 16];
  float min[kMaxBlock / 16];  // zero for types without one
};

// Decodes one block of a quantised type (anything but F32, F16, BF16).
void decode_block(int32_t type, const uint8_t* block, DecodedBlock* out);

// IEEE half (bits) to float, exact for every pattern (NaN stays NaN).
float half_to_float(uint16_t bits);

}  // namespace kt
