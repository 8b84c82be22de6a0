// How one phase's work is shared out: a static run per worker, then pieces that anybody may take.
//
// The static half keeps each worker on one long sequential stream of weights. The other half is
// handed out by an atomic counter, two thirds of it in one long piece for each worker, the rest in
// small ones: it absorbs unequal cores and interrupted threads. On a virtual machine one of 16
// threads often runs at two thirds of the others' speed for milliseconds; when only a sixth was
// handed out, the others waited a fifth of every phase for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "host/workers.h"

namespace kt {

// Weights below which handing out a piece costs more than it evens out: 2 to 3 us of one core.
inline constexpr int64_t kPieceBytes = 32 << 10;

// Counter of one phase and one part, on a cache line of its own; zeroed before the step starts.
struct alignas(64) TailCounter {
  std::atomic<int64_t> next{0};
};

// How much of [0, count) is shared out in advance, in units.
inline int64_t fixed_units(int64_t count, int64_t unit, int64_t team) {
  return count < team * unit * 2 ? 0 : count / 2 / unit;
}

// Calls body(first, last) over pieces of [0, count) until all pieces of the team are taken.
// index: this worker's place in its team of `team` workers. Pieces begin and end at multiples of
// `unit` (or at count), but for the last sixth of the work: there they have at least `chunk`.
template <class Body>
void share_range(int64_t count, int64_t unit, int64_t index, int64_t team, int64_t chunk,
                 TailCounter& tail, Body&& body) {
  if (team == 1) {
    if (count > 0) {
      body(int64_t{0}, count);
    }
    return;
  }
  const int64_t fixed = fixed_units(count, unit, team) * unit;
  const Range mine = split(fixed / unit, index, team);
  if (mine.first < mine.last) {
    body(mine.first * unit, mine.last * unit);
  }
  int64_t large = (count - fixed) * 2 / (3 * team) / unit * unit;
  large = large > chunk ? large : 0;
  const int64_t num_large = large > 0 ? team : 0;
  const int64_t rest = fixed + num_large * large;
  const int64_t small = std::max(chunk, (count - rest) / (8 * team));
  while (true) {
    const int64_t ticket = tail.next.fetch_add(1, std::memory_order_relaxed);
    const bool is_large = ticket < num_large;
    const int64_t first = is_large ? fixed + ticket * large : rest + (ticket - num_large) * small;
    if (first >= count) {
      return;
    }
    body(first, std::min(first + (is_large ? large : small), count));
  }
}

}  // namespace kt
