// CPUID says what the core can do, XCR0 what the operating system saves on a context switch; an
// instruction is usable only when both agree (a CPUID bit alone has crashed other projects' users).
#include "host/features.h"

#include "base/error.h"
#include "kt.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kt {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) {
    return Registers{};
  }
  return r;
}

// Reads XCR0; only legal when CPUID reports OSXSAVE.
uint64_t xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr bool bit(uint64_t value, int index) { return ((value >> index) & 1) != 0; }
constexpr bool covers(uint64_t value, uint64_t mask) { return (value & mask) == mask; }

// Linux hands the 8 KiB tile state out on request only (arch_prctl ARCH_REQ_XCOMP_PERM).
bool request_amx() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

uint32_t detect() {
  uint32_t mask = 1u << KT_ISA_SCALAR;
  const Registers basic = cpuid(1, 0);
  const bool os_saves = bit(basic.c, 27);
  if (!os_saves) {
    return mask;
  }
  const uint64_t state = xcr0();
  const Registers more = cpuid(7, 0);
  const Registers newer = cpuid(7, 1);
  constexpr uint64_t kYmm = 0x6;   // SSE and AVX halves
  constexpr uint64_t kZmm = 0xe6;  // the same, opmask, upper halves, 16 more registers
  constexpr uint64_t kTile = 0x60000;
  const bool avx2 = covers(state, kYmm) && bit(basic.c, 28) && bit(basic.c, 12) &&
                    bit(basic.c, 29) && bit(more.b, 5) && bit(more.b, 8);
  if (!avx2) {
    return mask;
  }
  mask |= 1u << KT_ISA_AVX2;
  const bool avx512 = covers(state, kZmm) && bit(more.b, 16) && bit(more.b, 17) &&
                      bit(more.b, 28) && bit(more.b, 30) && bit(more.b, 31);
  if (!avx512) {
    return mask;
  }
  mask |= 1u << KT_ISA_AVX512;
  const bool vnni = bit(more.c, 1) && bit(more.c, 11) && bit(newer.a, 5);
  if (!vnni) {
    return mask;
  }
  mask |= 1u << KT_ISA_AVX512VNNI;
  // Tile, int8 and bf16; AVX512-FP16 and VBMI decode the weights (every CPU with AMX has them).
  const bool amx = covers(state, kTile) && bit(more.d, 22) && bit(more.d, 24) && bit(more.d, 25) &&
                   bit(more.d, 23) && bit(more.c, 1);
  if (amx && request_amx()) {
    mask |= 1u << KT_ISA_AMX;
  }
  return mask;
}

#else

uint32_t detect() { return 1u << KT_ISA_SCALAR; }

#endif

}  // namespace

uint32_t isa_mask() {
  static const uint32_t mask = detect();
  return mask;
}

int32_t best_isa() {
  int32_t best = KT_ISA_SCALAR;
  for (int32_t isa = KT_ISA_SCALAR; isa <= KT_ISA_AMX; ++isa) {
    if (((isa_mask() >> isa) & 1u) != 0) {
      best = isa;
    }
  }
  return best;
}

int32_t resolve_isa(int32_t isa) {
  if (isa == KT_ISA_AUTO) {
    return best_isa();
  }
  if (isa < KT_ISA_SCALAR || isa > KT_ISA_AMX) {
    fail_argument("isa " + std::to_string(isa) + " is not one of -1 (auto), 0 .. 4");
  }
  if (((isa_mask() >> isa) & 1u) == 0) {
    fail_unsupported(std::string("isa ") + isa_name(isa) + " is not available here, the best is " +
                     isa_name(best_isa()));
  }
  return isa;
}

const char* isa_name(int32_t isa) {
  switch (isa) {
    case KT_ISA_SCALAR:
      return "scalar";
    case KT_ISA_AVX2:
      return "avx2";
    case KT_ISA_AVX512:
      return "avx512";
    case KT_ISA_AVX512VNNI:
      return "avx512vnni";
    case KT_ISA_AMX:
      return "amx";
    default:
      return "unknown";
  }
}

std::string cpu_name() {
#if defined(__x86_64__)
  std::string name;
  for (uint32_t leaf = 0x80000002u; leaf <= 0x80000004u; ++leaf) {
    const Registers r = cpuid(leaf, 0);
    for (const uint32_t word : {r.a, r.b, r.c, r.d}) {
      for (int shift = 0; shift < 32; shift += 8) {
        const char c = static_cast<char>((word >> shift) & 0xff);
        if (c != '\0') {
          name.push_back(c);
        }
      }
    }
  }
#else
  std::string name = "unknown CPU";
#endif
  const size_t first = name.find_first_not_of(' ');
  const size_t last = name.find_last_not_of(' ');
  return first == std::string::npos ? std::string() : name.substr(first, last - first + 1);
}

}  // namespace kt
