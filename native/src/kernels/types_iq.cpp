// types_iq.cpp: decoders of the codebook types IQ1, IQ2, IQ3.
//
// Compiled with -ffp-contract=off, as types.cpp. Codebook rows are kept as the bytes they stand for
// (8 or 4 weights in one word), and signs are applied to a whole word at once.
#include "kernels/types_iq.h"

#include <array>
#include <cstring>

namespace kt {
namespace {

#include "kernels/iq_tables.inl"

constexpr uint64_t kOnes = 0x0101010101010101u;

// Codes of kPerRow values of kBits bits -> words of bytes.
template <class Word, int kBits, size_t kRows, size_t kValues>
constexpr std::array<Word, kRows> expand(const uint16_t (&codes)[kRows],
                                         const int8_t (&values)[kValues]) {
  std::array<Word, kRows> rows{};
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t i = 0; i < sizeof(Word); ++i) {
      const auto value = static_cast<uint8_t>(values[(codes[row] >> (kBits * i)) % kValues]);
      rows[row] |= static_cast<Word>(value) << (8 * i);
    }
  }
  return rows;
}

constexpr int8_t kIq1Values[4] = {0, 8, 16, 8};  // 8 g + 8
constexpr int8_t kIq2Values[4] = {8, 25, 43, 0};
constexpr int8_t kIq3XxsValues[8] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr int8_t kIq3SValues[8] = {1, 3, 5, 7, 9, 11, 13, 15};
constexpr auto kIq1Rows = expand<uint64_t, 2>(kIq1Grid, kIq1Values);
constexpr auto kIq2XxsRows = expand<uint64_t, 2>(kIq2XxsGrid, kIq2Values);
constexpr auto kIq2XsRows = expand<uint64_t, 2>(kIq2XsGrid, kIq2Values);
constexpr auto kIq2SRows = expand<uint64_t, 2>(kIq2SGrid, kIq2Values);
constexpr auto kIq3XxsRows = expand<uint32_t, 3>(kIq3XxsGrid, kIq3XxsValues);
constexpr auto kIq3SRows = expand<uint32_t, 3>(kIq3SGrid, kIq3SValues);

// Bit i -> 0xff in byte i.
constexpr std::array<uint64_t, 256> make_masks() {
  std::array<uint64_t, 256> masks{};
  for (unsigned signs = 0; signs < 256; ++signs) {
    for (unsigned i = 0; i < 8; ++i) {
      masks[signs] |= (signs >> i & 1u) != 0 ? uint64_t{0xff} << (8 * i) : 0;
    }
  }
  return masks;
}
constexpr std::array<uint64_t, 256> kMasks = make_masks();

// The same for the 7 bits that stand for 8.
constexpr std::array<uint64_t, 128> make_even_masks() {
  std::array<uint64_t, 128> masks{};
  for (unsigned bits = 0; bits < 128; ++bits) {
    masks[bits] = kMasks[kIqSigns[bits]];
  }
  return masks;
}
constexpr std::array<uint64_t, 128> kEvenMasks = make_even_masks();

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

// Eight bytes, none of them zero (or the complement would carry), negated where the mask is set.
void put(uint64_t row, uint64_t mask, int8_t* q) {
  const uint64_t bytes = (row ^ mask) + (mask & kOnes);
  std::memcpy(q, &bytes, 8);
}

// IQ1 weights are dl * (g +- 1/8), g in {-1, 0, 1}: eight times that is the integer, and dl / 8 is
// exact, so the product rounds as the reference's does. Rows hold 8 g + 8; the sums stay below 256,
// so that nothing carries.
void put_iq1(uint64_t row, bool minus, int8_t* q) {
  const uint64_t bytes = (row + (minus ? 119 : 121) * kOnes) ^ (0x80 * kOnes);
  std::memcpy(q, &bytes, 8);
}

uint64_t two(uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; }

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
      put(kIq2XxsRows[qs[i]], kEvenMasks[(bits >> (7 * i)) & 127], out->q + 32 * j + 8 * i);
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
      put(kIq2XsRows[code & 511], kEvenMasks[code >> 9], out->q + 16 * j + 8 * i);
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
    put(kIq2SRows[b[2 + g] | high << 8], kMasks[b[34 + g]], out->q + 8 * g);
  }
}

void decode_iq3_xxs(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 8; ++j) {
    const uint32_t bits = load32(b + 66 + 4 * j);
    const float scale = d * (0.5f + static_cast<float>(bits >> 28)) * 0.5f;
    out->scale[2 * j] = out->scale[2 * j + 1] = scale;
    for (int i = 0; i < 4; ++i) {
      const uint8_t* code = b + 2 + 8 * j + 2 * i;
      put(two(kIq3XxsRows[code[0]], kIq3XxsRows[code[1]]), kEvenMasks[(bits >> (7 * i)) & 127],
          out->q + 32 * j + 8 * i);
    }
  }
}

void decode_iq3_s(const uint8_t* b, DecodedBlock* out) {
  const float d = load_half(b);
  no_mins(out);
  for (int j = 0; j < 8; ++j) {
    const int scale = (b[106 + j / 2] >> (4 * (j & 1))) & 15;
    out->scale[2 * j] = out->scale[2 * j + 1] = d * static_cast<float>(1 + 2 * scale);
  }
  for (int g = 0; g < 32; ++g) {
    const uint8_t* code = b + 2 + 2 * g;
    const unsigned high = b[66 + g / 4] >> (2 * (g % 4));
    put(two(kIq3SRows[code[0] | (high & 1) << 8], kIq3SRows[code[1] | (high & 2) << 7]),
        kMasks[b[74 + g]], out->q + 8 * g);
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
      put_iq1(kIq1Rows[code], (high & 0x8000) != 0, out->q + 32 * j + 8 * i);
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
      put_iq1(kIq1Rows[b[2 * j + i] | (high & 7) << 8], (high & 8) != 0, out->q + 16 * j + 8 * i);
    }
  }
}

}  // namespace kt
