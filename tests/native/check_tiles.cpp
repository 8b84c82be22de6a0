// check_tiles.cpp: the AMX kernels against the AVX-512 VNNI ones. Linked with emulated tiles where
// the CPU has none. Prints "ok", or what differs.
//
// multiply_band must agree bit for bit with VNNI (BF16 within 1e-5), and every row must have the
// same bits alone as among 70. multiply_prompt must agree with the decoded weights within the
// rounding of weights and activations to bf16, and every row must have the same bits in any
// company.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/blocks.h"
#include "kernels/kernels.h"

namespace {

constexpr int kRows = 70, kStride = 20;
constexpr int kBands = 5, kOutputs = 16 * kBands, kPromptStride = kOutputs + 16;
// Error of a sum of products whose factors are rounded to 8 bits, over the root of the sum of their
// squares: at most 2^-9 for each factor; 1.1e-3 .. 2.8e-3 were seen.
constexpr double kPromptError = 4e-3;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t, Free>;

Bytes allocate(int64_t bytes) {
  Bytes memory(static_cast<uint8_t*>(
      std::aligned_alloc(64, static_cast<size_t>((bytes + 16384) / 64 * 64))));
  std::memset(memory.get(), 0x7f, static_cast<size_t>(bytes));  // NaN where nothing is written
  return memory;
}

// Random blocks whose f16 and e8m0 fields are of moderate size.
std::vector<uint8_t> random_rows(int32_t type, int64_t num_bytes, std::mt19937& random) {
  std::vector<uint8_t> data(static_cast<size_t>(num_bytes));
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<uint8_t>(random());
    const bool top_of_f32 = type == kt::kF32 && i % 4 == 3;
    const bool top_of_bf16 = type == kt::kBF16 && i % 2 == 1;
    if (top_of_f32 || top_of_bf16) {
      data[i] = static_cast<uint8_t>((data[i] & 0x80) | 0x3f);
    } else if (type != kt::kF32 && type != kt::kBF16) {
      data[i] &= 0x3b;
    }
  }
  return data;
}

struct Case {
  kt::Matrix w;
  Bytes band, amx_acts, vnni_acts, prompt_acts, packed_acts, scratch;
  int64_t stride = 0;
  std::vector<float> weights, x;  // [kOutputs, cols] decoded, [kRows, cols]

  Case(int32_t type, int32_t cols, std::mt19937& random) {
    const kt::TypeTraits* traits = kt::type_traits(type);
    const int64_t row_bytes = int64_t{cols} / traits->block_size * traits->block_bytes;
    kt::matrix_format(type, cols, &w.act, &w.band_bytes);
    const std::vector<uint8_t> rows = random_rows(type, kOutputs * row_bytes, random);
    band = allocate(kBands * w.band_bytes);
    for (int i = 0; i < kBands; ++i) {
      kt::pack_band(type, cols, rows.data() + i * 16 * row_bytes, row_bytes, 16,
                    band.get() + i * w.band_bytes);
    }
    weights.resize(size_t{kOutputs} * static_cast<size_t>(cols));
    kt::dequantize_row(type, rows.data(), kOutputs * int64_t{cols}, weights.data());
    w.type = type;
    w.rows = kOutputs;
    w.cols = cols;
    w.num_bands = kBands;
    w.expert_bytes = kBands * w.band_bytes;
    w.data = band.get();
    stride = kt::act_row_bytes(w.act, cols);
    amx_acts = allocate(stride * kRows);
    vnni_acts = allocate(stride * kRows);
    scratch = allocate(kt::multiply_scratch_bytes(cols));
    std::normal_distribution<float> normal;
    x.resize(size_t{kRows} * static_cast<size_t>(cols));
    prompt_acts = allocate(stride * kRows);
    for (float& value : x) {
      value = normal(random);
    }
    const kt::MatrixKernels& amx = *kt::matrix_kernels(4);
    for (int64_t i = 0; i < kRows; ++i) {
      const float* row = x.data() + i * cols;
      // In two pieces, as two workers would.
      const int32_t cut = 64;
      for (const kt::ActKind kind : {w.act, kt::kActBf16}) {
        if (kind == kt::kActBf16 && w.act != kt::kActQ8) {
          continue;
        }
        uint8_t* to = (kind == w.act ? amx_acts : prompt_acts).get() + i * stride;
        amx.prepare(kind, row, cols, 0, cut, to);
        amx.prepare(kind, row + cut, cols, cut, cols - cut, to);
      }
      kt::matrix_kernels(3)->prepare(w.act, row, cols, 0, cols, vnni_acts.get() + i * stride);
    }
    packed_acts = allocate(stride * kRows);
    for (int64_t k = 0; w.act == kt::kActQ8 && k < cols / 32; ++k) {
      for (int64_t i = 0; i < kRows; ++i) {
        std::memcpy(packed_acts.get() + (k * kRows + i) * 64,
                    prompt_acts.get() + i * stride + k * 64, 64);
      }
    }
  }

  std::vector<float> multiply(int isa, const int32_t* rows, int m) {
    std::vector<float> out(size_t{kRows} * kStride, -1.0f);
    const uint8_t* acts = isa == 4 ? amx_acts.get() : vnni_acts.get();
    kt::matrix_kernels(isa)->multiply_band(w, 0, 0, acts, stride, rows, m, out.data(), kStride,
                                           scratch.get(), nullptr);
    return out;
  }
};

// Rows [first, first + m) of the last num_bands bands; packed: from lines of all rows next to each
// other.
std::vector<float> multiply_prompt(Case& c, int first, int m, int num_bands, bool packed) {
  std::vector<float> out(size_t{kRows} * kPromptStride, -1.0f);
  kt::PromptRows rows;
  rows.row_stride = packed ? 64 : c.stride;
  rows.line_stride = packed ? 64 * kRows : 64;
  rows.acts = (packed ? c.packed_acts : c.prompt_acts).get() + first * rows.row_stride;
  rows.m = m;
  rows.ahead = c.prompt_acts.get();
  rows.ahead_bytes = 64 * m;
  kt::matrix_kernels(4)->multiply_prompt(c.w, 0, kBands - num_bands, num_bands, rows, out.data(),
                                         kPromptStride, c.scratch.get(), nullptr);
  return out;
}

double prompt_error(const Case& c, const std::vector<float>& out) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t r = 0; r < kOutputs; ++r) {
      const auto cols = static_cast<size_t>(c.w.cols);
      double exact = 0, terms = 0;
      for (size_t k = 0; k < cols; ++k) {
        const double term = double{c.x[i * cols + k]} * double{c.weights[r * cols + k]};
        exact += term;
        terms += term * term;
      }
      difference += std::pow(double{out[i * kPromptStride + r]} - exact, 2);
      size += terms;
    }
  }
  return std::sqrt(difference / size);
}

int check_prompt(Case& c, const char* name) {
  int failures = 0;
  const auto at = [](const std::vector<float>& out, int i) {
    return &out[size_t{kPromptStride} * static_cast<size_t>(i)];
  };
  const std::vector<float> all = multiply_prompt(c, 0, kRows, kBands, false);
  const double error = prompt_error(c, all);
  if (!(error < kPromptError)) {
    std::printf("%s, %d columns: prompt rows are wrong by %.1e\n", name, c.w.cols, error);
    ++failures;
  }
  for (const int m : {1, 2, 15, 16, 17, 31, 32, 33, 40, 47, 48, 49, 64, 65, 70}) {
    for (const int num_bands : {1, 2, 3, 4}) {
      const int first = kRows - m;
      const std::vector<float> out =
          multiply_prompt(c, first, m, num_bands, (m + num_bands) % 2 == 0);
      for (int i = 0; i < kRows; ++i) {
        const float* expected = at(all, first + i) + 16 * (kBands - num_bands);
        const size_t bytes = size_t{64} * static_cast<size_t>(num_bands);
        if (i < m && std::memcmp(at(out, i), expected, bytes) != 0) {
          std::printf("%s, %d columns: prompt row %d changes among %d\n", name, c.w.cols, i, m);
          ++failures;
        }
        // Nothing beside the result is written.
        for (int r = i < m ? 16 * num_bands : 0; r < kPromptStride; ++r) {
          failures += at(out, i)[r] != -1.0f;
        }
      }
    }
  }
  return failures;
}

bool agree(const std::vector<float>& a, const std::vector<float>& b, bool exact) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (exact && std::memcmp(&a[i], &b[i], 4) != 0) {
      return false;
    }
    difference += std::pow(a[i] - b[i], 2);
    size += std::pow(b[i], 2);
  }
  return difference <= 1e-10 * size;
}

int check(int32_t type, int32_t cols, std::mt19937& random) {
  Case c(type, cols, random);
  const char* name = kt::type_traits(type)->name;
  std::vector<int32_t> shuffled(kRows);
  const int32_t* const choices[] = {nullptr, shuffled.data()};
  for (int i = 0; i < kRows; ++i) {
    shuffled[static_cast<size_t>(i)] = (i * 7 + i % 3) % kRows;
  }
  int failures = 0;
  for (const int m : {1, 2, 5, 8, 9, 15, 16, 17, 31, 32, 33, 64, 70}) {
    for (const int32_t* rows : choices) {
      if (!agree(c.multiply(4, rows, m), c.multiply(3, rows, m), type != kt::kBF16)) {
        std::printf("%s, %d columns: %d rows%s differ\n", name, cols, m, rows ? " gathered" : "");
        ++failures;
      }
    }
  }
  const std::vector<float> all = c.multiply(4, nullptr, kRows);
  for (int32_t i = 0; i < kRows; ++i) {
    if (std::memcmp(c.multiply(4, &i, 1).data(), &all[static_cast<size_t>(i) * kStride], 64) != 0) {
      std::printf("%s, %d columns: row %d changes in company\n", name, cols, i);
      ++failures;
    }
  }
  if (c.w.act == kt::kActQ8) {
    failures += check_prompt(c, name);
  }
  return failures;
}

}  // namespace

int main() {
  std::mt19937 random(3);
  int failures = 0;
  for (int32_t type = 0; type < 64; ++type) {
    const kt::TypeTraits* traits = kt::type_traits(type);
    if (traits == nullptr) {
      continue;
    }
    for (const int32_t blocks : {1, 3}) {  // whole tiles, and where the type has them cut ones
      const int32_t least = traits->block_size == 1 ? 295 : traits->block_size == 32 ? 288 : 256;
      failures += check(type, least * blocks, random);
    }
  }
  if (failures == 0) {
    std::puts("ok");
  }
  return failures != 0;
}
