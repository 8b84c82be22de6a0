// Entry points for tensor types and single packed matrices (tests, benchmarks,
// kt_experts_multiply).
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "abi/matrix_handle.h"
#include "base/arena.h"
#include "base/error.h"
#include "experts/tasks.h"
#include "host/features.h"
#include "kernels/pack_tensor.h"

namespace kt {
namespace {

const TypeTraits& require_type(int32_t type) {
  const TypeTraits* traits = type_traits(type);
  if (traits == nullptr) {
    fail_unsupported("tensor type " + std::to_string(type) + " is unknown to this build");
  }
  return *traits;
}

// Every expert's bands are split alike, so that the worker that packs a band also multiplies it.
void pack_all(kt_matrix* matrix, const kt_tensor& tensor, uint8_t* data) {
  const Matrix& w = matrix->view;
  Workers& workers = matrix->pool->workers;
  workers.for_each([&](int32_t worker) {
    const Range bands = split(w.num_bands, worker, workers.num_threads());
    for (int64_t expert = 0; expert < w.num_experts; ++expert) {
      pack_bands(tensor, w, expert * w.num_bands + bands.first, bands.last - bands.first, data);
    }
  });
}

// Prepared rows, times some bands, into the result, whose rows are w.rows apart; the last
// band may be cut off.
struct Product {
  const MatrixKernels& kernels;
  const Matrix& w;
  int32_t expert;
  const uint8_t* acts;
  int64_t stride;
  bool is_prompt;
  float* out;
  float* partial;  // [num_rows, kPromptBands * kBandRows], for the worker that has the last band

  void bands(int32_t band, int32_t num_bands, int32_t first, int32_t m, void* scratch) const {
    float* to = out + int64_t{first} * w.rows + int64_t{band} * kBandRows;
    const int32_t columns = std::min(num_bands * kBandRows, w.rows - band * kBandRows);
    const bool direct = columns == num_bands * kBandRows;
    float* sums = direct ? to : partial;
    const int64_t sums_stride = direct ? w.rows : num_bands * kBandRows;
    const uint8_t* x = acts + first * stride;
    // What comes after a worker's last band is read for nothing, which a product can afford.
    const int32_t then = band + num_bands;
    const uint8_t* next = then < w.num_bands ? band_at(w, expert, then) : nullptr;
    if (is_prompt) {
      const PromptRows rows = {.acts = x, .row_stride = stride, .m = m};
      kernels.multiply_prompt(w, expert, band, num_bands, rows, sums, sums_stride, scratch, next);
    } else {
      kernels.multiply_band(w, expert, band, x, stride, nullptr, m, sums, sums_stride, scratch,
                            next);
    }
    for (int64_t i = 0; i < m && !direct; ++i) {
      std::memcpy(to + i * w.rows, sums + i * sums_stride, static_cast<size_t>(columns) * 4);
    }
  }
};

// Memory of one call, in huge pages and kept by the pool: a timed call would otherwise pay for
// fresh pages, and tiles of rows that lie in small ones miss the TLB 16 times.
class Workspace {
 public:
  // Room for `bytes`; what was handed out before is no longer valid.
  uint8_t* reserve(int64_t bytes) {
    if (bytes > bytes_) {
      arena_ = std::make_unique<Arena>();
      bytes_ = 0;
      data_ = arena_->allocate(bytes);
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  std::unique_ptr<Arena> arena_;
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

Workspace& workspace_of(kt_pool& pool) {
  if (pool.matrix_memory == nullptr) {
    pool.matrix_memory = std::make_shared<Workspace>();
  }
  return *static_cast<Workspace*>(pool.matrix_memory.get());
}

void multiply(const kt_matrix& matrix, int32_t expert, const float* x, int32_t num_rows, float* out,
              bool is_prompt) {
  const Matrix& w = matrix.view;
  Workers& workers = matrix.pool->workers;
  const MatrixKernels& kernels = *matrix_kernels(workers.isa());
  is_prompt = is_prompt && w.act == kActQ8 && kernels.multiply_prompt != nullptr;
  const ActKind form = form_of(w.act, is_prompt);
  const int64_t stride = act_row_bytes(form, w.cols);
  const int64_t scratch_bytes = (multiply_scratch_bytes(w.cols) + 63) / 64 * 64;
  const int64_t act_bytes = stride * num_rows;
  const int64_t all_scratch = scratch_bytes * workers.num_threads();
  const std::lock_guard<std::mutex> lock(matrix.pool->matrix_lock);
  uint8_t* acts =
      workspace_of(*matrix.pool)
          .reserve(act_bytes + all_scratch + int64_t{kPromptBands * kBandRows} * num_rows * 4);
  uint8_t* all = acts + act_bytes;
  const Product product = {kernels, w,         expert, acts,
                           stride,  is_prompt, out,    reinterpret_cast<float*>(all + all_scratch)};
  TailCounter tail;
  workers.for_each([&](int32_t worker) {
    const int32_t threads = workers.num_threads();
    const Range rows = split(num_rows, worker, threads);
    for (int64_t i = rows.first; i < rows.last; ++i) {
      kernels.prepare(form, x + i * w.cols, w.cols, 0, w.cols, acts + i * stride);
    }
    workers.barrier();
    uint8_t* scratch = all + worker * scratch_bytes;
    if (!is_prompt) {
      const Range bands = split(w.num_bands, worker, threads);
      for (auto band = static_cast<int32_t>(bands.first); band < bands.last; ++band) {
        product.bands(band, 1, 0, num_rows, scratch);
      }
      return;
    }
    // As the model does it: block of rows after block, all pairs of bands for each; what is left
    // goes to whoever is done.
    const int64_t pairs = (w.num_bands + 1) / 2,
                  blocks = (num_rows + kPromptRows - 1) / kPromptRows;
    share_range(pairs * blocks, 1, worker, threads, 1, tail, [&](int64_t lo, int64_t hi) {
      while (lo < hi) {
        const auto first = static_cast<int32_t>(lo / pairs) * kPromptRows;
        const auto band = static_cast<int32_t>(2 * (lo % pairs));
        const int64_t count = std::min({hi - lo, pairs - lo % pairs, int64_t{kPromptBands / 2}});
        product.bands(band, std::min(static_cast<int32_t>(2 * count), w.num_bands - band), first,
                      std::min(kPromptRows, num_rows - first), scratch);
        lo += count;
      }
    });
  });
}

// Every worker times itself while all of them are busy: the sum is what they reach together, also
// where some share a core with each other or with strangers and take longer.
double peak_rate(Workers& workers, int32_t kind) {
  const MatrixKernels& kernels = *matrix_kernels(workers.isa());
  if (kernels.peak(kind, 1) == 0) {
    constexpr const char* kNames[] = {"integer", "bf16", "f32"};
    fail_unsupported(std::string(isa_name(workers.isa())) + " has no " + kNames[kind] +
                     " multiply-add instruction");
  }
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::duration<double> kPass{0.01};
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    std::vector<double> rates(static_cast<size_t>(workers.num_threads()));
    workers.for_each([&](int32_t worker) {
      workers.barrier();
      const auto start = Clock::now();
      std::chrono::duration<double> seconds{0};
      int64_t count = 0;
      while (seconds < kPass) {
        count += kernels.peak(kind, 10000);
        seconds = Clock::now() - start;
      }
      rates[static_cast<size_t>(worker)] = static_cast<double>(count) / seconds.count();
    });
    best = std::max(best, std::accumulate(rates.begin(), rates.end(), 0.0));
  }
  return best;
}

}  // namespace
}  // namespace kt

extern "C" {

int32_t kt_type_query(int32_t type, kt_type_info* out) {
  return kt::guard([&] {
    kt::require_struct(out, "kt_type_info");
    const kt::TypeTraits& traits = kt::require_type(type);
    *out = kt_type_info{};
    out->struct_size = sizeof(kt_type_info);
    out->type = type;
    out->block_size = traits.block_size;
    out->block_bytes = traits.block_bytes;
    out->has_kernel = traits.has_kernel;
    std::strncpy(out->name, traits.name, sizeof(out->name) - 1);
    return KT_OK;
  });
}

int32_t kt_dequantize(int32_t type, const void* src, int64_t num_weights, float* dst) {
  return kt::guard([&] {
    const kt::TypeTraits& traits = kt::require_type(type);
    if (num_weights < 0 || num_weights % traits.block_size != 0) {
      kt::fail_argument("num_weights is " + std::to_string(num_weights) +
                        ", not a multiple of the " + traits.name + " block of " +
                        std::to_string(traits.block_size));
    }
    if (num_weights == 0) {
      return KT_OK;
    }
    kt::require_handle(src, "src");
    kt::require_handle(dst, "dst");
    kt::dequantize_row(type, static_cast<const uint8_t*>(src), num_weights, dst);
    return KT_OK;
  });
}

int32_t kt_matrix_create(kt_pool* pool, const kt_tensor* tensor, kt_matrix** out) {
  return kt::guard([&] {
    kt::require_struct(tensor, "kt_tensor");
    kt::require_handle(out, "out");
    kt::require_handle(pool, "pool");
    *out = nullptr;
    auto matrix = std::make_unique<kt_matrix>();
    matrix->pool = pool;
    matrix->view = kt::describe_matrix(*tensor);
    matrix->gguf_bytes = tensor->num_bytes;
    uint8_t* data = matrix->memory.allocate(matrix->view.expert_bytes * matrix->view.num_experts);
    matrix->view.data = data;
    kt::pack_all(matrix.get(), *tensor, data);
    *out = matrix.release();
    return KT_OK;
  });
}

int32_t kt_matrix_destroy(kt_matrix* matrix) {
  return kt::guard([&] {
    delete matrix;
    return KT_OK;
  });
}

int32_t kt_matrix_unpack(const kt_matrix* matrix, void* dst, int64_t capacity) {
  return kt::guard([&] {
    kt::require_handle(matrix, "matrix");
    kt::require_handle(dst, "dst");
    if (capacity < matrix->gguf_bytes) {
      kt::fail_argument("capacity is " + std::to_string(capacity) + " bytes, the tensor has " +
                        std::to_string(matrix->gguf_bytes));
    }
    const kt::Matrix& w = matrix->view;
    const int64_t row_bytes = matrix->gguf_bytes / w.num_experts / w.rows;
    auto* to = static_cast<uint8_t*>(dst);
    for (int32_t expert = 0; expert < w.num_experts; ++expert) {
      for (int32_t band = 0; band < w.num_bands; ++band) {
        const int32_t left = w.rows - band * kt::kBandRows;
        const int32_t count = left < kt::kBandRows ? left : kt::kBandRows;
        kt::unpack_band(w.type, w.cols, kt::band_at(w, expert, band), row_bytes, count, to);
        to += count * row_bytes;
      }
    }
    return KT_OK;
  });
}

int32_t kt_matrix_multiply(const kt_matrix* matrix, int32_t expert, const float* x,
                           int32_t num_rows, float* out, int32_t is_prompt) {
  return kt::guard([&] {
    kt::require_handle(matrix, "matrix");
    const kt::Matrix& w = matrix->view;
    if (expert < 0 || expert >= w.num_experts) {
      kt::fail_argument("expert is " + std::to_string(expert) + ", the matrix has " +
                        std::to_string(w.num_experts));
    }
    if (num_rows < 0) {
      kt::fail_argument("num_rows is " + std::to_string(num_rows));
    }
    if (is_prompt < 0 || is_prompt > 1) {
      kt::fail_argument("is_prompt is " + std::to_string(is_prompt) + ", allowed is 0 or 1");
    }
    if (num_rows == 0) {
      return KT_OK;
    }
    kt::require_handle(x, "x");
    kt::require_handle(out, "out");
    kt::multiply(*matrix, expert, x, num_rows, out, is_prompt != 0);
    return KT_OK;
  });
}

int32_t kt_bench_peak(kt_pool* pool, int32_t kind, double* macs_per_second) {
  return kt::guard([&] {
    kt::require_handle(pool, "pool");
    kt::require_handle(macs_per_second, "macs_per_second");
    if (kind < 0 || kind > 2) {
      kt::fail_argument("kind is " + std::to_string(kind) + ", allowed is 0 .. 2");
    }
    *macs_per_second = kt::peak_rate(pool->workers, kind);
    return KT_OK;
  });
}

}  // extern "C"
