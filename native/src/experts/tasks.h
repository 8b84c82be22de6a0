// How one phase's bands are shared out: a static run per worker plus a tail anybody may take.
//
// The static part keeps each worker on one long sequential stream of weights. The last part absorbs
// unequal cores and interrupted threads: it is handed out piece by piece by an atomic counter.
#pragma once

#include <atomic>
#include <cstdint>

#include "host/workers.h"

namespace kt {

// Counter of one phase and one part, on a cache line of its own; zeroed before the step starts.
struct alignas(64) TailCounter {
  std::atomic<int64_t> next{0};
};

// Calls body(first, last) over pieces of [0, count) until all pieces of the team are taken.
// index: this worker's place in its team of `team` workers. chunk: size of a tail piece.
template <class Body>
void share_range(int64_t count, int64_t index, int64_t team, int64_t chunk, TailCounter& tail,
                 Body&& body) {
  if (team == 1) {
    if (count > 0) {
      body(int64_t{0}, count);
    }
    return;
  }
  constexpr int64_t kTailShare = 6;  // a sixth of the work is dynamic
  const int64_t fixed = count < team * 2 ? 0 : count - count / kTailShare;
  const Range mine = split(fixed, index, team);
  if (mine.first < mine.last) {
    body(mine.first, mine.last);
  }
  while (true) {
    const int64_t first = fixed + tail.next.fetch_add(chunk, std::memory_order_relaxed);
    if (first >= count) {
      return;
    }
    const int64_t last = first + chunk < count ? first + chunk : count;
    body(first, last);
  }
}

}  // namespace kt
