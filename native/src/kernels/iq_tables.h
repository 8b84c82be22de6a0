// iq_tables.h: codebooks of the IQ types (data; written by native/make_iq_tables.py).
#pragma once

#include <cstdint>

namespace kt {

extern const uint8_t kIqSigns[128];  // 7 stored sign bits -> 8, with even parity
// Rows of 8 values, 2 bits each, low bits first: index into {8, 25, 43}, for kIq1Grid {-1, 0, 1}.
extern const uint16_t kIq2XxsGrid[256];
extern const uint16_t kIq2XsGrid[512];
extern const uint16_t kIq2SGrid[1024];
extern const uint16_t kIq1Grid[2048];
// Rows of 4 values, 3 bits each: index into {4, 12, .., 52, 62} and {1, 3, .., 15}.
extern const uint16_t kIq3XxsGrid[256];
extern const uint16_t kIq3SGrid[512];

}  // namespace kt
