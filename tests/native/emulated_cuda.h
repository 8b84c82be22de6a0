// emulated_cuda.h: what native/cuda's kernels for packed weights need of CUDA, on a CPU, so that
// their arithmetic can be tested where there is no GPU. Stands in for base.cu. A block's threads
// are fibers that run in turn until they meet at a barrier or a warp's exchange; blocks run one
// after another.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef signed char i8;
typedef long long i64;

struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

struct Dim {
  unsigned x, y, z;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;
alignas(16) static u8 shared_memory[1 << 18];

using std::max;
using std::min;

namespace emulated {

constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_done = false;
};
// Threads that meet: a warp or a block.
struct Meeting {
  unsigned size = 0, arrived = 0, generation = 0;
};
struct Warp {
  Meeting meeting;
  uint64_t exchange[2][32];
  unsigned turn[32] = {};
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Meeting block;
static ucontext_t scheduler;
static std::function<void()> body;

static inline void meet(Meeting& m) {
  const unsigned generation = m.generation, me = threadIdx.x;
  if (++m.arrived == m.size) {
    m.arrived = 0;
    ++m.generation;
    return;
  }
  while (m.generation == generation) {
    swapcontext(&fibers[me].context, &scheduler);
  }
}

static void enter() {
  body();
  const unsigned me = threadIdx.x;
  fibers[me].is_done = true;
  for (Meeting* m : {&warps[me / 32].meeting, &block}) {  // the others no longer wait for this one
    if (--m->size > 0 && m->arrived == m->size) {
      m->arrived = 0;
      ++m->generation;
    }
  }
  swapcontext(&fibers[me].context, &scheduler);
}

static inline void run_block(unsigned threads) {
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp());
  block = Meeting();
  block.size = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) {
      fiber.stack.reset(new char[kStack]);
    }
    fiber.is_done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
    ++warps[i / 32].meeting.size;
  }
  for (unsigned left = threads; left > 0;) {
    for (unsigned i = 0; i < threads; ++i) {
      if (!fibers[i].is_done) {
        threadIdx = {i, 0, 0};
        swapcontext(&scheduler, &fibers[i].context);
        left -= fibers[i].is_done;
      }
    }
  }
}

// Every lane gives a value and gets that of lane `from`.
template <typename T>
T exchange(T value, int from) {
  const unsigned lane = threadIdx.x & 31;
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned turn = warp.turn[lane]++ & 1;
  std::memcpy(&warp.exchange[turn][lane], &value, sizeof(T));
  meet(warp.meeting);
  T got;
  std::memcpy(&got, &warp.exchange[turn][from & 31], sizeof(T));
  return got;
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

template <typename... A>
void launch(void (*kernel)(A...), unsigned x, unsigned y, unsigned threads, void** arguments) {
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  body = [=] { call(kernel, arguments, std::index_sequence_for<A...>()); };
  for (unsigned j = 0; j < y; ++j) {
    for (unsigned i = 0; i < x; ++i) {
      blockIdx = {i, j, 0};
      std::memset(shared_memory, 0xa5, sizeof(shared_memory));
      run_block(threads);
    }
  }
}

}  // namespace emulated

static inline void __syncthreads() { emulated::meet(emulated::block); }
static inline void __syncwarp() { emulated::meet(emulated::warps[threadIdx.x / 32].meeting); }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulated::exchange(value, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::exchange(value, static_cast<int>(threadIdx.x & 31) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = threadIdx.x & 31;
  return emulated::exchange(value, lane >= step ? lane - step : lane);
}
static inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename To, typename From>
To bits_of(From value) {
  To to;
  static_assert(sizeof(to) == sizeof(value), "same size");
  std::memcpy(&to, &value, sizeof(to));
  return to;
}
static inline float __int_as_float(int v) { return bits_of<float>(v); }
static inline float __uint_as_float(u32 v) { return bits_of<float>(v); }
static inline u32 __float_as_uint(float v) { return bits_of<u32>(v); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
#define __expf expf
#define __fdividef(a, b) ((a) / (b))
static inline int __float2int_rn(float v) { return static_cast<int>(nearbyintf(v)); }
static inline u32 __byte_perm(u32 low, u32 high, u32 select) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<u32>(bytes >> (8 * (select >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return out;
}

// ---- base.cu's own

static inline void wait_for_previous() {}
static inline void release_next() {}
static inline float half_to_float(u32 bits) {
  _Float16 h;
  const u16 low = static_cast<u16>(bits);
  std::memcpy(&h, &low, 2);
  return static_cast<float>(h);
}
static inline u32 bf16_pair(float low, float high) {
  const auto round = [](float f) {
    const u32 v = bits_of<u32>(f);
    return (v + 0x7fff + (v >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
static inline float bf16_low(u32 pair) { return bits_of<float>(pair << 16); }
static inline float bf16_high(u32 pair) { return bits_of<float>(pair & 0xffff0000u); }
static inline void copy_16(u8* to, const u8* from) { std::memcpy(to, from, 16); }
static inline void end_copies() {}
static inline void wait_for_copies(int) {}

// What the machine keeps of a number.
static inline float eleven_bits(float v) { return bits_of<float>(bits_of<u32>(v) & 0xffffe000u); }

static inline void multiply_tile(int (&d)[4], const u32 (&a)[4], uint2 b, const int (&c)[4]) {
  const int lane = threadIdx.x & 31, group = lane & ~3, t = lane & 3;
  int sum[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < 4; ++k) {
    u32 row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = __shfl_sync(~0u, a[i], group | k);
    }
    for (int i = 0; i < 2; ++i) {
      const int from = 4 * (2 * t + i) | k;
      const u32 column[2] = {__shfl_sync(~0u, b.x, from), __shfl_sync(~0u, b.y, from)};
      for (int r = 0; r < 2; ++r) {
        for (int j = 0; j < 8; ++j) {
          const int shift = 8 * (j & 3);
          sum[2 * r + i] += static_cast<i8>(row[r + 2 * (j >> 2)] >> shift) *
                            static_cast<i8>(column[j >> 2] >> shift);
        }
      }
    }
  }
  std::memcpy(d, sum, sizeof(sum));
}

static inline void multiply_floats(float (&d)[4], const float (&a)[4], float2 b,
                                   const float (&c)[4]) {
  const int lane = threadIdx.x & 31, group = lane & ~3, t = lane & 3;
  float sum[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < 4; ++k) {
    float row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = eleven_bits(__shfl_sync(~0u, a[i], group | k));
    }
    for (int i = 0; i < 2; ++i) {
      const int from = 4 * (2 * t + i) | k;
      const float low = eleven_bits(__shfl_sync(~0u, b.x, from));
      const float high = eleven_bits(__shfl_sync(~0u, b.y, from));
      for (int r = 0; r < 2; ++r) {
        sum[2 * r + i] += row[r] * low + row[r + 2] * high;
      }
    }
  }
  std::memcpy(d, sum, sizeof(sum));
}

static inline void multiply_add(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = threadIdx.x & 31, group = lane & ~3, t = lane & 3;
  for (int k = 0; k < 4; ++k) {
    u32 row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = __shfl_sync(~0u, i == 0 ? a0 : i == 1 ? a1 : i == 2 ? a2 : a3, group | k);
    }
    for (int i = 0; i < 2; ++i) {
      const int from = 4 * (2 * t + i) | k;
      const u32 column[2] = {__shfl_sync(~0u, b0, from), __shfl_sync(~0u, b1, from)};
      for (int r = 0; r < 2; ++r) {
        for (int j = 0; j < 4; ++j) {
          const u32 x = row[r + 2 * (j >> 1)], y = column[j >> 1];
          c[2 * r + i] += (j & 1) ? bf16_high(x) * bf16_high(y) : bf16_low(x) * bf16_low(y);
        }
      }
    }
  }
}
