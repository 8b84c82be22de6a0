// What this CPU, its operating system and this build allow. Called from any thread; the answers
// never change while the process lives.
#pragma once

#include <cstdint>
#include <string>

namespace kt {

// Bit KT_ISA_x is set when x may be used. Asks the kernel for the AMX tile state once, because a
// process that executes a tile instruction without that permission is killed.
uint32_t isa_mask();
// Highest set bit of isa_mask().
int32_t best_isa();
// Turns KT_ISA_AUTO into best_isa(); KT_ERR_UNSUPPORTED for an ISA this machine lacks.
int32_t resolve_isa(int32_t isa);
const char* isa_name(int32_t isa);
std::string cpu_name();

}  // namespace kt
