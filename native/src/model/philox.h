// Philox4x32-10, the counter-based generator of Salmon et al. (SC'11): a draw is a pure function of
// (seed, position), so it does not depend on batch, slot or how often anything else was sampled.
#pragma once

#include <cstdint>

namespace kt {

struct PhiloxBlock {
  uint32_t word[4];
};

inline PhiloxBlock philox(uint64_t key, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) {
      c[i] = next[i];
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// Uniform in [0, 1) with 53 bits.
inline double philox_uniform(uint64_t seed, uint64_t position) {
  const PhiloxBlock block = philox(seed, position);
  const uint64_t high = block.word[0] >> 5;
  const uint64_t low = block.word[1] >> 6;
  return static_cast<double>((high << 26) | low) * (1.0 / 9007199254740992.0);
}

}  // namespace kt
