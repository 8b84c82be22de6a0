// types_iq.h: block decoders of the codebook types; see decode_block.
#pragma once

#include <cstdint>

#include "kernels/blocks.h"

namespace kt {

void decode_iq1_s(const uint8_t* block, DecodedBlock* out);
void decode_iq1_m(const uint8_t* block, DecodedBlock* out);
void decode_iq2_xxs(const uint8_t* block, DecodedBlock* out);
void decode_iq2_xs(const uint8_t* block, DecodedBlock* out);
void decode_iq2_s(const uint8_t* block, DecodedBlock* out);
void decode_iq3_xxs(const uint8_t* block, DecodedBlock* out);
void decode_iq3_s(const uint8_t* block, DecodedBlock* out);

}  // namespace kt
