// pack.cpp: GGUF rows <-> R16 bands. Pure permutations of bits, described in layout.h.
//
// Each format is described once, by a function that moves bits between a row's GGUF blocks and a
// tile; the template parameter says in which direction. So unpack is the inverse of pack by
// construction. Bands and blocks are zeroed first: missing rows, and bits put together by OR.
#include "kernels/pack.h"

#include <cstring>

#include "kernels/kernels.h"
#include "kernels/layout.h"

namespace kt {
namespace {

uint32_t load32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}
void store32(uint8_t* p, uint32_t value) { std::memcpy(p, &value, 4); }

uint64_t load64(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}
void store64(uint8_t* p, uint64_t value) { std::memcpy(p, &value, 8); }

constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0fu;
constexpr uint32_t kBits = 0x01010101u;

// Nibbles at bit `shift` of eight GGUF bytes (eight columns) <-> one tile word, which holds the
// first four in its low nibbles and the others in its high ones.
template <bool kPack>
inline void move_nibbles(uint8_t* gguf, int shift, uint8_t* word) {
  if constexpr (kPack) {
    const uint64_t bits = (load64(gguf) >> shift) & kNibbles;
    store32(word, static_cast<uint32_t>(bits | bits >> 28));
  } else {
    const uint64_t bits = load32(word);
    store64(gguf, load64(gguf) | ((bits | bits << 28) & kNibbles) << shift);
  }
}

// Transposes bits within every byte of some words: field j of word i <-> field i of word j, with
// 8 words of 1-bit fields or 4 words of 2-bit fields. Its own inverse.
template <int kWords>
inline void transpose_fields(uint32_t* words) {
  constexpr int kWidth = 8 / kWords;
  for (int step = kWords / 2; step > 0; step /= 2) {
    const uint32_t mask = step * kWidth == 4   ? 0x0f0f0f0fu
                          : step * kWidth == 2 ? 0x33333333u
                                               : 0x55555555u;
    for (int i = 0; i < kWords; ++i) {
      if ((i & step) == 0) {
        const uint32_t swap = (words[i] >> (step * kWidth) ^ words[i + step]) & mask;
        words[i] ^= swap << (step * kWidth);
        words[i + step] ^= swap;
      }
    }
  }
}

// 4 * kWords GGUF bytes <-> kWords tile words, stride bytes apart: word j gets field j of all
// bytes, those of GGUF word i as its field i.
template <bool kPack, int kWords>
inline void move_fields(uint8_t* gguf, uint8_t* tile_words, int stride) {
  uint32_t words[kWords];
  for (int i = 0; i < kWords; ++i) {
    words[i] = load32(kPack ? gguf + 4 * i : tile_words + stride * i);
  }
  transpose_fields<kWords>(words);
  for (int i = 0; i < kWords; ++i) {
    store32(kPack ? tile_words + stride * i : gguf + 4 * i, words[i]);
  }
}

template <bool kPack>
inline void move_bytes(uint8_t* gguf, uint8_t* tile, size_t count) {
  if constexpr (kPack) {
    std::memcpy(tile, gguf, count);
  } else {
    std::memcpy(gguf, tile, count);
  }
}

// Tile word of columns 8 i .. 8 i + 7, counted from the first column of the nibble plane.
inline uint8_t* nibble_word(uint8_t* tile, int i, int row) { return tile + i * 64 + row * 4; }

// Nibbles of one 32-block whose low nibbles are columns 0..15 and high nibbles 16..31.
template <bool kPack>
void move_nibbles32(uint8_t* qs, uint8_t* lines, int row) {
  for (int i = 0; i < 4; ++i) {
    move_nibbles<kPack>(qs + i % 2 * 8, i / 2 * 4, nibble_word(lines, i, row));
  }
}

// Nibbles of a Q4_K or Q5_K block: 64 columns share 32 bytes.
template <bool kPack>
void move_nibbles_k(uint8_t* qs, uint8_t* lines, int row) {
  for (int i = 0; i < 32; ++i) {
    move_nibbles<kPack>(qs + i / 8 * 32 + i % 4 * 8, i % 8 / 4 * 4, nibble_word(lines, i, row));
  }
}

// Top bits of a 32-block: bit k of a word <-> bit k / 4 of byte k % 4. The products spread four
// bits over four bytes and gather them again.
template <bool kPack>
void move_bits32(uint8_t* high, uint8_t* line, int row) {
  uint8_t* word = line + row * 4;
  const uint32_t from = load32(kPack ? high : word);
  uint32_t to = 0;
  for (int i = 0; i < 8; ++i) {
    to |= kPack ? (((from >> (4 * i) & 15u) * 0x00204081u) & kBits) << i
                : (((from >> i & kBits) * 0x01020408u) >> 24 & 15u) << (4 * i);
  }
  store32(kPack ? word : high, to);
}

// 2-bit values of a Q2_K or Q3_K block, top pairs of a Q6_K block: 128 columns share 32 bytes.
template <bool kPack>
void move_pairs(uint8_t* qs, uint8_t* lines, int row) {
  for (int half = 0; half < 2; ++half) {
    for (int l = 0; l < 2; ++l) {  // quarter q of these 16 bytes is line 8 half + 2 q + l
      move_fields<kPack, 4>(qs + half * 32 + l * 16, lines + (half * 8 + l) * 64 + row * 4, 128);
    }
  }
}

// The f16 fields of the rows of a tile stand side by side.
template <bool kPack>
void move_half(uint8_t* gguf, uint8_t* halves, int row) {
  move_bytes<kPack>(gguf, halves + row * 2, 2);
}

// A row's byte table (scales): byte i of the row <-> row `row` of plane i.
template <bool kPack>
void move_planes(uint8_t* gguf, uint8_t* planes, int count, int row) {
  for (int i = 0; i < count; ++i) {
    move_bytes<kPack>(gguf + i, planes + i * 16 + row, 1);
  }
}

// One 32-block type; nb blocks in this tile.
template <bool kPack>
void move_legacy(int32_t type, uint8_t* block, int nb, uint8_t* tile, int row) {
  for (int b = 0; b < nb; ++b) {
    switch (type) {
      case kQ8_0:
        for (int g = 0; g < 8; ++g) {
          move_bytes<kPack>(block + 2 + 4 * g, tile + (b * 8 + g) * 64 + row * 4, 4);
        }
        move_half<kPack>(block, tile + nb * 512 + b * 32, row);
        block += 34;
        break;
      case kQ4_0:
      case kIQ4_NL:
        move_nibbles32<kPack>(block + 2, tile + b * 256, row);
        move_half<kPack>(block, tile + nb * 256 + b * 32, row);
        block += 18;
        break;
      case kQ4_1:
        move_nibbles32<kPack>(block + 4, tile + b * 256, row);
        move_half<kPack>(block, tile + nb * 256 + b * 32, row);
        move_half<kPack>(block + 2, tile + nb * 288 + b * 32, row);
        block += 20;
        break;
      case kQ5_0:
        move_nibbles32<kPack>(block + 6, tile + b * 256, row);
        move_bits32<kPack>(block + 2, tile + nb * 256 + b * 64, row);
        move_half<kPack>(block, tile + nb * 320 + b * 32, row);
        block += 22;
        break;
      case kQ5_1:
        move_nibbles32<kPack>(block + 8, tile + b * 256, row);
        move_bits32<kPack>(block + 4, tile + nb * 256 + b * 64, row);
        move_half<kPack>(block, tile + nb * 320 + b * 32, row);
        move_half<kPack>(block + 2, tile + nb * 352 + b * 32, row);
        block += 24;
        break;
      default:  // MXFP4
        move_nibbles32<kPack>(block + 1, tile + b * 256, row);
        move_bytes<kPack>(block, tile + nb * 256 + b * 16 + row, 1);
        block += 17;
        break;
    }
  }
}

template <bool kPack>
void move_q4_k(uint8_t* block, uint8_t* tile, int row) {
  move_nibbles_k<kPack>(block + 16, tile, row);
  move_planes<kPack>(block + 4, tile + 2048, 12, row);
  move_half<kPack>(block, tile + 2240, row);
  move_half<kPack>(block + 2, tile + 2272, row);
}

template <bool kPack>
void move_q5_k(uint8_t* block, uint8_t* tile, int row) {
  move_nibbles_k<kPack>(block + 48, tile, row);
  move_fields<kPack, 8>(block + 16, tile + 2048 + row * 4,
                        64);  // bit b of byte l is column 32 b + l
  move_planes<kPack>(block + 4, tile + 2560, 12, row);
  move_half<kPack>(block, tile + 2752, row);
  move_half<kPack>(block + 2, tile + 2784, row);
}

// halves: the d of this tile, before the first tile of the band.
template <bool kPack>
void move_q6_k(uint8_t* block, uint8_t* halves, uint8_t* tile, int row) {
  for (int i = 0; i < 32; ++i) {
    const int half = i / 16, quarter = i % 16 / 4, l = i % 4 * 8;
    move_nibbles<kPack>(block + half * 64 + (quarter & 1) * 32 + l, 4 * (quarter >> 1),
                        nibble_word(tile, i, row));
  }
  move_pairs<kPack>(block + 128, tile + 2048, row);
  move_planes<kPack>(block + 192, tile + 3072, 16, row);
  move_half<kPack>(block + 208, halves, row);
}

template <bool kPack>
void move_q2_k(uint8_t* block, uint8_t* tile, int row) {
  move_pairs<kPack>(block + 16, tile, row);
  move_planes<kPack>(block, tile + 1024, 16, row);
  move_half<kPack>(block + 80, tile + 1280, row);
  move_half<kPack>(block + 82, tile + 1312, row);
}

// halves: as for Q6_K.
template <bool kPack>
void move_q3_k(uint8_t* block, uint8_t* halves, uint8_t* tile, int row) {
  move_pairs<kPack>(block + 32, tile, row);
  move_fields<kPack, 8>(block, tile + 1024 + row * 4, 64);  // bit b of byte l is column 32 b + l
  move_planes<kPack>(block + 96, tile + 1536, 12, row);
  move_half<kPack>(block + 108, halves, row);
}

template <bool kPack>
void move_iq4_xs(uint8_t* block, uint8_t* tile, int row) {
  for (int b = 0; b < 8; ++b) {
    move_nibbles32<kPack>(block + 8 + 16 * b, tile + 256 * b, row);
  }
  move_planes<kPack>(block + 4, tile + 2048, 4, row);
  move_half<kPack>(block, tile + 2112, row);
  move_half<kPack>(block + 2, tile + 2144, row);
}

// Moves one row's blocks of one tile.
template <bool kPack>
void move_tile(int32_t type, int32_t cols, uint8_t* block, uint8_t* band, int32_t tile_idx,
               int32_t row) {
  uint8_t* tile = band + band_header(type, cols) + tile_idx * tile_bytes(type);
  switch (type) {
    case kQ2_K:
      return move_q2_k<kPack>(block, tile, row);
    case kQ3_K:
      return move_q3_k<kPack>(block, band + tile_idx * 32, tile, row);
    case kQ4_K:
      return move_q4_k<kPack>(block, tile, row);
    case kQ5_K:
      return move_q5_k<kPack>(block, tile, row);
    case kQ6_K:
      return move_q6_k<kPack>(block, band + tile_idx * 32, tile, row);
    case kIQ4_XS:
      return move_iq4_xs<kPack>(block, tile, row);
    default: {
      const int left = (cols - tile_idx * kTileCols) / 32;
      return move_legacy<kPack>(type, block, left < 8 ? left : 8, tile, row);
    }
  }
}

template <bool kPack>
void move_row(int32_t type, int32_t cols, uint8_t* src, uint8_t* band, int32_t row) {
  const TypeTraits* traits = type_traits(type);
  if (type == kF32) {
    for (int32_t k = 0; k < cols; ++k) {
      move_bytes<kPack>(src + 4 * k, band + 64 * static_cast<int64_t>(k) + 4 * row, 4);
    }
  } else if (type == kF16) {
    for (int32_t k = 0; k < cols; ++k) {
      move_bytes<kPack>(src + 2 * k, band + 32 * static_cast<int64_t>(k) + 2 * row, 2);
    }
  } else if (type == kBF16) {
    for (int32_t k = 0; k < cols; ++k) {
      move_bytes<kPack>(src + 2 * k,
                        band + 64 * static_cast<int64_t>(k / 2) + 4 * row + 2 * (k & 1), 2);
    }
  } else if (tile_bytes(type) == 0) {
    const int64_t block_bytes = traits->block_bytes;  // of 256 columns
    for (int32_t tile = 0; tile * kTileCols < cols; ++tile) {
      move_bytes<kPack>(src + tile * block_bytes, band + (tile * kBandRows + row) * block_bytes,
                        static_cast<size_t>(block_bytes));
    }
  } else {
    const int64_t tile_row_bytes = kTileCols / traits->block_size * traits->block_bytes;
    for (int32_t tile = 0; tile * kTileCols < cols; ++tile) {
      move_tile<kPack>(type, cols, src + tile * tile_row_bytes, band, tile, row);
    }
  }
}

}  // namespace

bool has_tiles(int32_t type) { return tile_bytes(type) != 0; }

int64_t act_row_bytes(ActKind kind, int32_t cols) {
  if (kind == kActF32) {
    return odd_lines(float_row_bytes(cols) + 2 * bf16_plane_bytes(cols));
  }
  const int64_t bf16 = 2 * align_up(cols, 32), q8 = act_layout(cols).end;
  return odd_lines(kind == kActQ8 && q8 > bf16 ? q8 : bf16);
}

int64_t multiply_scratch_bytes(int32_t cols) {
  // One row as f32 (scalar), or decoded tiles and sums (AMX: 32 KiB and kPromptRows * 128 bytes).
  constexpr int64_t kTiles = 96 << 10;
  const int64_t row = float_row_bytes(cols);
  return row < kTiles ? kTiles : row;
}

bool matrix_format(int32_t type, int32_t cols, ActKind* act, int64_t* band_bytes) {
  const TypeTraits* traits = type_traits(type);
  if (traits == nullptr || cols <= 0 || cols % traits->block_size != 0) {
    return false;
  }
  const int64_t row_bytes = static_cast<int64_t>(cols) / traits->block_size * traits->block_bytes;
  const int64_t header = band_header(type, cols);
  // An odd last column of BF16 still takes a whole line of pairs.
  const int64_t bytes =
      type == kBF16
          ? (static_cast<int64_t>(cols) + 1) / 2 * 64
          : align_up(kBandRows * row_bytes + (header != 0 ? header - cols / 256 * 32 : 0), 64);
  *act = type == kF32 || type == kF16 || type == kBF16 ? kActF32 : kActQ8;
  *band_bytes = bytes;
  return true;
}

void pack_band(int32_t type, int32_t cols, const uint8_t* src, int64_t row_bytes, int32_t num_rows,
               uint8_t* band) {
  ActKind act;
  int64_t band_bytes = 0;
  if (!matrix_format(type, cols, &act, &band_bytes)) {
    return;
  }
  std::memset(band, 0, static_cast<size_t>(band_bytes));
  for (int32_t row = 0; row < num_rows; ++row) {
    // Packing only reads through this pointer (kPack is a template parameter of one body).
    move_row<true>(type, cols, const_cast<uint8_t*>(src + row * row_bytes), band, row);
  }
}

void unpack_band(int32_t type, int32_t cols, const uint8_t* band, int64_t row_bytes,
                 int32_t num_rows, uint8_t* dst) {
  const TypeTraits* traits = type_traits(type);
  if (traits == nullptr) {
    return;
  }
  const int64_t used = static_cast<int64_t>(cols) / traits->block_size * traits->block_bytes;
  for (int32_t row = 0; row < num_rows; ++row) {
    std::memset(dst + row * row_bytes, 0, static_cast<size_t>(used));
    move_row<false>(type, cols, dst + row * row_bytes, const_cast<uint8_t*>(band), row);
  }
}

void unpack_tile(int32_t type, int32_t cols, const uint8_t* band, int32_t tile, int32_t row,
                 uint8_t* blocks) {
  const TypeTraits* traits = type_traits(type);
  const int32_t left = cols - tile * kTileCols;
  const int32_t count = (left < kTileCols ? left : kTileCols) / traits->block_size;
  std::memset(blocks, 0, static_cast<size_t>(count * traits->block_bytes));
  move_tile<false>(type, cols, blocks, const_cast<uint8_t*>(band), tile, row);
}

}  // namespace kt
