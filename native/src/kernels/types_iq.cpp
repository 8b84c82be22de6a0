// types_iq.cpp: decoders of the codebook types IQ1, IQ2, IQ3.
//
// Compiled with -ffp-contract=off, as types.cpp.
#include "kernels/types_iq.h"

#include <cstring>

#include "kernels/iq_tables.h"

namespace kt {
namespace {

constexpr int8_t kIq2Values[4] = {8, 25, 43, 0};
constexpr int8_t kIq3XxsValues[8] = {4, 12, 20, 28, 36, 44, 52, 62};

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

// Eight weights of an IQ2 codebook row; bit i of signs negates weight i.
void put_iq2(uint16_t row, unsigned signs, int8_t* q) {
  for (int i = 0; i < 8; ++i) {
    const int value = kIq2Values[(row >> (2 * i)) & 3];
    q[i] = static_cast<int8_t>((signs >> i) & 1 ? -value : value);
  }
}

// Four weights of an IQ3 codebook row.
void put_iq3(uint16_t row, const int8_t* values, unsigned signs, int8_t* q) {
  for (int i = 0; i < 4; ++i) {
    const int value = values[(row >> (3 * i)) & 7];
    q[i] = static_cast<int8_t>((signs >> i) & 1 ? -value : value);
  }
}

// IQ1 weights are dl * (g +- 1/8), g in {-1, 0, 1}: eight times that is the integer, and dl / 8 is
// exact, so the product rounds as the reference's does.
void put_iq1(uint16_t row, bool minus, int8_t* q) {
  for (int i = 0; i < 8; ++i) {
    const int value = static_cast<int>((row >> (2 * i)) & 3) - 1;
    q[i] = static_cast<int8_t>(8 * value + (minus ? -1 : 1));
  }
}

void no_mins(DecodedBlock* out) { std::memset(out->min, 0, sizeof(out->min)); }

}  // namespace

void decode_iq2_xxs(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 8; ++j) {
    const uint8_t* qs = b + 2 + 8 * j;
    const uint32_t bits = load32(qs + 4);
    const float scale = d * (0.5f + static_cast<float>(bits >> 28)) * 0.25f;
    out->scale[2 * j] = out->scale[2 * j + 1] = scale;
    for (int i = 0; i < 4; ++i) {
      put_iq2(kIq2XxsGrid[qs[i]], kIqSigns[(bits >> (7 * i)) & 127], out->q + 32 * j + 8 * i);
    }
  }
}

void decode_iq2_xs(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 16; ++j) {
    const int scale = (b[66 + j / 2] >> (4 * (j & 1))) & 15;
    out->scale[j] = d * (0.5f + static_cast<float>(scale)) * 0.25f;
    for (int i = 0; i < 2; ++i) {
      const unsigned code = load16(b + 2 + 4 * j + 2 * i);
      put_iq2(kIq2XsGrid[code & 511], kIqSigns[code >> 9], out->q + 16 * j + 8 * i);
    }
  }
}

void decode_iq2_s(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 16; ++j) {
    const int scale = (b[74 + j / 2] >> (4 * (j & 1))) & 15;
    out->scale[j] = d * (0.5f + static_cast<float>(scale)) * 0.25f;
  }
  for (int g = 0; g < 32; ++g) {
    const unsigned high = (b[66 + g / 4] >> (2 * (g % 4))) & 3u;
    put_iq2(kIq2SGrid[b[2 + g] | high << 8], b[34 + g], out->q + 8 * g);
  }
}

void decode_iq3_xxs(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 8; ++j) {
    const uint32_t bits = load32(b + 66 + 4 * j);
    const float scale = d * (0.5f + static_cast<float>(bits >> 28)) * 0.5f;
    out->scale[2 * j] = out->scale[2 * j + 1] = scale;
    for (int i = 0; i < 8; ++i) {
      const unsigned signs = kIqSigns[(bits >> (7 * (i / 2))) & 127];
      put_iq3(kIq3XxsGrid[b[2 + 8 * j + i]], kIq3XxsValues, signs >> (4 * (i & 1)),
              out->q + 32 * j + 4 * i);
    }
  }
}

void decode_iq3_s(const uint8_t* b, DecodedBlock* out) {
  constexpr int8_t kValues[8] = {1, 3, 5, 7, 9, 11, 13, 15};
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 8; ++j) {
    const int scale = (b[106 + j / 2] >> (4 * (j & 1))) & 15;
    out->scale[2 * j] = out->scale[2 * j + 1] = d * static_cast<float>(1 + 2 * scale);
  }
  for (int g = 0; g < 64; ++g) {
    const unsigned high = (b[66 + g / 8] >> (g % 8)) & 1u;
    put_iq3(kIq3SGrid[b[2 + g] | high << 8], kValues, b[74 + g / 2] >> (4 * (g & 1)),
            out->q + 4 * g);
  }
}

void decode_iq1_s(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 8; ++j) {
    const unsigned high = load16(b + 34 + 2 * j);
    const float scale = d * static_cast<float>(2 * ((high >> 12) & 7) + 1) * 0.125f;
    out->scale[2 * j] = out->scale[2 * j + 1] = scale;
    for (int i = 0; i < 4; ++i) {
      const unsigned code = b[2 + 4 * j + i] | ((high >> (3 * i)) & 7) << 8;
      put_iq1(kIq1Grid[code], (high & 0x8000) != 0, out->q + 32 * j + 8 * i);
    }
  }
}

void decode_iq1_m(const uint8_t* b, DecodedBlock* out) {
  const uint8_t* scales = b + 48;
  unsigned bits = 0;  // the f16 scale is spread over the top nibbles of the four scale words
  for (int i = 0; i < 4; ++i) {
    bits |= (load16(scales + 2 * i) & 0xf000u) >> (12 - 4 * i);
  }
  const float d = half_to_float(static_cast<uint16_t>(bits));
  no_mins(out);
  for (int j = 0; j < 16; ++j) {
    const unsigned scale = (load16(scales + j / 4 * 2) >> (3 * (j % 4))) & 7;
    out->scale[j] = d * static_cast<float>(2 * scale + 1) * 0.125f;
    for (int i = 0; i < 2; ++i) {
      const unsigned high = b[32 + j] >> (4 * i);
      put_iq1(kIq1Grid[b[2 * j + i] | (high & 7) << 8], (high & 8) != 0, out->q + 16 * j + 8 * i);
    }
  }
}

}  // namespace kt
