// Q4_K rows as they lie in a GGUF file against the library's packed bands (R16): what does the
// packing at load bring? Not part of the library; `bench/raw_rows.sh` builds and runs it.
//
// The raw kernel is the best one known to us for rows: one row at a time along its columns, 64
// nibbles an instruction, integer scales applied by a 16-bit dot product, up to 8 rows of
// activations for one pass over the weights; with AMX and 16 or more, tiles of 16 rows. It has
// one advantage: activations carry one scale per 256 columns, the packed kernels' one per 32.
// Usage: raw_rows [THREADS]; prints one line for each number of activation rows and instruction
// set.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "host/workers.h"
#include "kt.h"

namespace {

constexpr int32_t kQ4K = 12, kCols = 2048, kBlock = 256, kBlocks = kCols / kBlock;
constexpr int32_t kRows = 320000, kCopies = 2;  // 2 x 369 MB, in turn
constexpr int32_t kMost = 64;                   // activation rows
constexpr int32_t kTileRows = 16, kGroups = 8;  // rows of a tile; groups of 32 weights in a block

struct Q4K {
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t nibbles[128];  // 4 x 32: low halves are groups 0 2 4 6, high halves 1 3 5 7
};
static_assert(sizeof(Q4K) == 144);

// 256 activations as int8, in the order in which the kernel meets the nibbles.
struct Acts {
  int8_t rows[kBlock];  // groups 0 2 1 3 4 6 5 7
  int16_t sums[kGroups];
  float scale;
};

// The same for 16 activation rows as tiles: 8 groups of [8][16 rows][4 columns].
struct ActTile {
  int8_t columns[kGroups][8][kTileRows][4];
  float sums[kGroups][kTileRows];
  float scale[kTileRows];
};

float to_float(uint16_t half) { return _cvtsh_ss(half); }

// Scales in the low, minima in the high 8 bytes.
void unpack_scales(const uint8_t* packed, uint8_t* out) {
  uint32_t w[3];
  std::memcpy(w, packed, 12);
  const uint32_t low = 0x0f0f0f0fu, top = 0x03030303u, six = 0x3f3f3f3fu;
  const uint32_t u[4] = {w[0] & six, (w[2] & low) | (((w[0] >> 6) & top) << 4), w[1] & six,
                         ((w[2] >> 4) & low) | (((w[1] >> 6) & top) << 4)};
  std::memcpy(out, u, 16);
}

void prepare(const float* x, Acts* out) {
  constexpr int kOrder[kGroups] = {0, 2, 1, 3, 4, 6, 5, 7};
  for (int b = 0; b < kBlocks; ++b, x += kBlock) {
    float largest = 0;
    for (int i = 0; i < kBlock; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    out[b].scale = largest / 127.0f;
    for (int place = 0; place < kGroups; ++place) {
      const int g = kOrder[place];
      int sum = 0;
      for (int i = 0; i < 32; ++i) {
        const int q = static_cast<int>(std::lrint(x[g * 32 + i] * inverse));
        out[b].rows[place * 32 + i] = static_cast<int8_t>(q);
        sum += q;
      }
      out[b].sums[g] = static_cast<int16_t>(sum);
    }
  }
}

// tiles [kBlocks] of 16 rows, from their int8 form.
void prepare_tile(const Acts* acts, ActTile* tiles) {
  constexpr int kOrder[kGroups] = {0, 2, 1, 3, 4, 6, 5, 7};
  for (int b = 0; b < kBlocks; ++b) {
    for (int t = 0; t < kTileRows; ++t) {
      const Acts& a = acts[t * kBlocks + b];
      tiles[b].scale[t] = a.scale;
      for (int place = 0; place < kGroups; ++place) {
        const int g = kOrder[place];
        tiles[b].sums[g][t] = a.sums[g];
        for (int i = 0; i < 32; ++i) {
          tiles[b].columns[g][i / 4][t][i % 4] = a.rows[place * 32 + i];
        }
      }
    }
  }
}

// M products of one row. out[m * kRows].
template <int M>
void row_times(const Q4K* row, const Acts* acts, float* out) {
  const __m512i low = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
  const __m512i pick[4] = {_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2),
                           _mm512_setr_epi32(1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3),
                           _mm512_setr_epi32(4, 4, 4, 4, 4, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6),
                           _mm512_setr_epi32(5, 5, 5, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7)};
  __m512 sum[M];
  __m128 offset[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    sum[m] = _mm512_setzero_ps();
    offset[m] = _mm_setzero_ps();
  }
  for (int b = 0; b < kBlocks; ++b) {
    const Q4K& block = row[b];
    _mm_prefetch(reinterpret_cast<const char*>(&block) + 2048, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(&block) + 2112, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(&block) + 2176, _MM_HINT_T1);
    uint8_t sc[16];
    unpack_scales(block.scales, sc);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sc));
    const __m512i scales = _mm512_castsi256_si512(_mm256_cvtepu8_epi32(bytes));
    const __m128i minima = _mm_cvtepu8_epi16(_mm_srli_si128(bytes, 8));
    const __m512i first = _mm512_loadu_si512(block.nibbles);
    const __m512i second = _mm512_loadu_si512(block.nibbles + 64);
    const __m512i w[4] = {
        _mm512_and_si512(first, low), _mm512_and_si512(_mm512_srli_epi16(first, 4), low),
        _mm512_and_si512(second, low), _mm512_and_si512(_mm512_srli_epi16(second, 4), low)};
    const float d = to_float(block.d), dmin = to_float(block.dmin);
    __m512i s[4];
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      s[i] = _mm512_permutexvar_epi32(pick[i], scales);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Acts& a = acts[m * kBlocks + b];
      __m512i total = zero;
#pragma GCC unroll 8
      for (int i = 0; i < 4; ++i) {
        const __m512i x = _mm512_loadu_si512(a.rows + 64 * i);
        // At most 4 * 15 * 127: fits 16 bits, and the scale's upper half is 0.
        total = _mm512_dpwssd_epi32(total, _mm512_dpbusd_epi32(zero, w[i], x), s[i]);
      }
      sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(d * a.scale), sum[m]);
      const __m128i sums = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.sums));
      const __m128i least = _mm_madd_epi16(minima, sums);
      offset[m] = _mm_fmadd_ps(_mm_cvtepi32_ps(least), _mm_set1_ps(dmin * a.scale), offset[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const __m128 o = offset[m];
    const float least = o[0] + o[1] + o[2] + o[3];
    out[int64_t{m} * kRows] = _mm512_reduce_add_ps(sum[m]) - least;
  }
}

void row_any(const Q4K* row, const Acts* acts, int32_t count, float* out) {
  int32_t m = 0;
  for (; m + 8 <= count; m += 8) {
    row_times<8>(row, acts + m * kBlocks, out + int64_t{m} * kRows);
  }
  for (; m + 4 <= count; m += 4) {
    row_times<4>(row, acts + m * kBlocks, out + int64_t{m} * kRows);
  }
  for (; m < count; ++m) {
    row_times<1>(row, acts + m * kBlocks, out + int64_t{m} * kRows);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// 16 rows times 16 * num_tiles activation rows. acts: [num_tiles][kBlocks].
void tile_times(const Q4K* rows, const ActTile* acts, int32_t num_tiles, float* out) {
  alignas(64) uint8_t weights[kGroups][kTileRows][32];
  float scale[kGroups][kTileRows], least[kGroups][kTileRows];
  alignas(64) int32_t product[kTileRows][16];
  alignas(64) static thread_local float total[kMost / kTileRows][kTileRows][16];
  std::memset(total, 0, sizeof(total));
  for (int b = 0; b < kBlocks; ++b) {
    for (int r = 0; r < kTileRows; ++r) {
      const Q4K& block = rows[r * kBlocks + b];
      uint8_t sc[16];
      unpack_scales(block.scales, sc);
      const float d = to_float(block.d), dmin = to_float(block.dmin);
      const __m256i low = _mm256_set1_epi8(15);
      for (int j = 0; j < 4; ++j) {
        const __m256i q =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.nibbles + 32 * j));
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights[2 * j][r]), _mm256_and_si256(q, low));
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights[2 * j + 1][r]),
                           _mm256_and_si256(_mm256_srli_epi16(q, 4), low));
      }
      for (int g = 0; g < kGroups; ++g) {
        scale[g][r] = d * sc[g];
        least[g][r] = dmin * sc[8 + g];
      }
    }
    for (int32_t t = 0; t < num_tiles; ++t) {
      const ActTile& a = acts[t * kBlocks + b];
      __m512 sum[kTileRows];
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        sum[r] = _mm512_setzero_ps();
      }
      for (int g = 0; g < kGroups; ++g) {
        _tile_zero(0);
        _tile_loadd(1, weights[g], 32);
        _tile_loadd(2, a.columns[g], 64);
        _tile_dpbssd(0, 1, 2);
        _tile_stored(0, product, 64);
        const __m512 sums = _mm512_loadu_ps(a.sums[g]);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          const __m512 p = _mm512_cvtepi32_ps(_mm512_load_si512(product[r]));
          sum[r] = _mm512_fmadd_ps(p, _mm512_set1_ps(scale[g][r]), sum[r]);
          sum[r] = _mm512_fnmadd_ps(sums, _mm512_set1_ps(least[g][r]), sum[r]);
        }
      }
      const __m512 factor = _mm512_loadu_ps(a.scale);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const __m512 before = _mm512_load_ps(total[t][r]);
        _mm512_store_ps(total[t][r], _mm512_fmadd_ps(sum[r], factor, before));
      }
    }
  }
  for (int32_t t = 0; t < num_tiles; ++t) {
    for (int i = 0; i < 16; ++i) {
      for (int r = 0; r < kTileRows; ++r) {
        out[int64_t{16 * t + i} * kRows + r] = total[t][r][i];
      }
    }
  }
}

struct Work {
  const Q4K* weights;
  const float* x;
  Acts* acts;
  ActTile* tiles;
  float* out;
  int32_t count;
  bool use_tiles;
};

void multiply_raw(kt::Workers& workers, const Work& work) {
  const int32_t threads = workers.num_threads();
  workers.for_each([&](int32_t worker) {
    const kt::Range mine = kt::split(work.count, worker, threads);
    for (int64_t i = mine.first; i < mine.last; ++i) {
      prepare(work.x + i * kCols, work.acts + i * kBlocks);
    }
    workers.barrier();
    if (!work.use_tiles) {
      const kt::Range rows = kt::split(kRows, worker, threads);
      for (int64_t r = rows.first; r < rows.last; ++r) {
        row_any(work.weights + r * kBlocks, work.acts, work.count, work.out + r);
      }
      return;
    }
    const int32_t num_tiles = work.count / kTileRows;
    const kt::Range tiles = kt::split(num_tiles, worker, threads);
    for (int64_t t = tiles.first; t < tiles.last; ++t) {
      prepare_tile(work.acts + t * kTileRows * kBlocks, work.tiles + t * kBlocks);
    }
    workers.barrier();
    TileConfig config;
    config.rows[0] = config.rows[1] = kTileRows;
    config.rows[2] = 8;
    config.column_bytes[0] = config.column_bytes[2] = 64;
    config.column_bytes[1] = 32;
    _tile_loadconfig(&config);
    const kt::Range bands = kt::split(kRows / kTileRows, worker, threads);
    for (int64_t b = bands.first; b < bands.last; ++b) {
      tile_times(work.weights + b * kTileRows * kBlocks, work.tiles, num_tiles,
                 work.out + b * kTileRows);
    }
    _tile_release();
  });
}

void check(int32_t status, const char* what) {
  if (status < 0) {
    std::fprintf(stderr, "%s: %s\n", what, kt_last_error());
    std::exit(1);
  }
}

template <typename Run>
double best_seconds(Run&& run) {
  double best = 1e9;
  for (int i = 0; i < 14; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run(i % kCopies);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = i < 2 ? best : std::min(best, seconds.count());  // two runs to warm up
  }
  return best;
}

// Relative error of the first 64 rows against sums in double over the decoded weights.
double error_of(const std::vector<uint8_t>& raw, const float* x, int32_t count, const float* out) {
  std::vector<float> w(64 * kCols);
  check(kt_dequantize(kQ4K, raw.data(), 64 * kCols, w.data()), "kt_dequantize");
  double difference = 0, size = 0;
  for (int32_t t = 0; t < count; ++t) {
    for (int32_t r = 0; r < 64; ++r) {
      double sum = 0;
      for (int32_t c = 0; c < kCols; ++c) {
        sum += double{w[static_cast<size_t>(r * kCols + c)]} * x[t * kCols + c];
      }
      difference += std::pow(out[int64_t{t} * kRows + r] - sum, 2);
      size += sum * sum;
    }
  }
  return std::sqrt(difference / size);
}

// Noise with sane scales; 16 MB drawn, repeated.
std::vector<uint8_t> random_rows() {
  std::vector<uint8_t> raw(int64_t{kRows} * kBlocks * sizeof(Q4K));
  uint64_t state = 88172645463325252u;
  const size_t drawn = 16'000'128;  // a multiple of the block
  for (size_t i = 0; i < drawn; ++i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    raw[i] = static_cast<uint8_t>(state >> 32);
  }
  for (size_t b = 0; b < drawn / sizeof(Q4K); ++b) {
    auto* block = reinterpret_cast<Q4K*>(&raw[b * sizeof(Q4K)]);
    block->d = 0x1400;  // about 0.001
    block->dmin = 0x1a00;
  }
  for (size_t i = drawn; i < raw.size(); ++i) {
    raw[i] = raw[i - drawn];
  }
  return raw;
}

}  // namespace

int main(int argc, char** argv) {
  kt_pool_config config = {};
  config.struct_size = sizeof(config);
  config.num_threads = argc > 1 ? std::atoi(argv[1]) : 0;
  config.spin_us = -1;
  config.pin = 1;
  kt_host_info host = {};
  host.struct_size = sizeof(host);
  check(kt_host_query(&host), "kt_host_query");
  if (((host.isa_mask >> KT_ISA_AVX512VNNI) & 1u) == 0) {
    std::fprintf(stderr, "raw_rows needs AVX-512 VNNI\n");
    return 1;
  }
  const std::vector<uint8_t> raw[kCopies] = {random_rows(), random_rows()};
  std::vector<float> x(static_cast<size_t>(kMost) * kCols);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = std::sin(static_cast<float>(i * i % 9973));
  }
  std::vector<float> out(static_cast<size_t>(kMost) * kRows);
  std::vector<Acts> acts(kMost * kBlocks);
  std::vector<ActTile> tiles(kMost / kTileRows * kBlocks);
  for (int32_t isa = KT_ISA_AVX512VNNI; isa <= KT_ISA_AMX; ++isa) {
    if (((host.isa_mask >> isa) & 1u) == 0) {
      continue;
    }
    config.isa = isa;
    kt_pool* pool = nullptr;
    check(kt_pool_create(&config, &pool), "kt_pool_create");
    double limit = 0;
    check(kt_bench_read(pool, int64_t{384} << 20, 8, &limit), "kt_bench_read");
    kt_matrix* packed[kCopies] = {};
    for (int i = 0; i < kCopies; ++i) {
      kt_tensor tensor = {};
      tensor.struct_size = sizeof(tensor);
      tensor.type = kQ4K;
      tensor.num_experts = 1;
      tensor.rows = kRows;
      tensor.cols = kCols;
      tensor.num_bytes = static_cast<int64_t>(raw[i].size());
      tensor.data = raw[i].data();
      check(kt_matrix_create(pool, &tensor, &packed[i]), "kt_matrix_create");
    }
    kt::Workers workers(config);
    std::printf("%s, %d threads, read %.1f GB/s\n", isa == KT_ISA_AMX ? "amx" : "avx512vnni",
                static_cast<int>(workers.num_threads()), limit / 1e9);
    for (const int32_t count : {1, 4, 8, 16, 64}) {
      const bool use_tiles = isa == KT_ISA_AMX && count >= kTileRows;
      const double rows = best_seconds([&](int copy) {
        multiply_raw(workers, {reinterpret_cast<const Q4K*>(raw[copy].data()), x.data(),
                               acts.data(), tiles.data(), out.data(), count, use_tiles});
      });
      const double wrong_raw = error_of(raw[0], x.data(), count, out.data());
      const double bands = best_seconds([&](int copy) {
        check(kt_matrix_multiply(packed[copy], 0, x.data(), count, out.data(), use_tiles ? 1 : 0),
              "kt_matrix_multiply");
      });
      const double wrong_bands = error_of(raw[0], x.data(), count, out.data());
      const auto bytes = static_cast<double>(raw[0].size());
      const double macs = double{kRows} * kCols * count;
      std::printf(
          "m %2d: raw rows %8.0f us %6.1f GB/s %6.0f GMAC/s error %.4f | R16 %8.0f us %6.1f GB/s "
          "%6.0f GMAC/s error %.4f | R16 %.2f x\n",
          static_cast<int>(count), rows * 1e6, bytes / rows / 1e9, macs / rows / 1e9, wrong_raw,
          bands * 1e6, bytes / bands / 1e9, macs / bands / 1e9, wrong_bands, rows / bands);
      if (!(wrong_raw < 0.02 && wrong_bands < 0.02)) {
        std::fprintf(stderr, "a product is wrong\n");
        return 1;
      }
    }
    for (kt_matrix* matrix : packed) {
      kt_matrix_destroy(matrix);
    }
    kt_pool_destroy(pool);
  }
  return 0;
}
