// pack.h: one row's tile of an R16 band back to GGUF blocks; used by the scalar kernel.
#pragma once

#include <cstdint>

namespace kt {

// True when the type has an R16 tile layout (not F32/F16/BF16, not GGUF bytes).
bool has_tiles(int32_t type);
// Writes the GGUF blocks of columns [256 tile, 256 tile + 256) of row `row` (0..15) of a band.
void unpack_tile(int32_t type, int32_t cols, const uint8_t* band, int32_t tile, int32_t row,
                 uint8_t* blocks);

}  // namespace kt
