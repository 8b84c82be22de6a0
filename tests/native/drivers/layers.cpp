// Driver of packed matrices and expert layers: every type and instruction set, several threads and
// nodes, callers at once, wrong input. Against sums in double over the decoded weights.
//
// tests/native/sanitize.sh runs it, also under an emulator for ARM64. Usage: layers [ISA].
#include <algorithm>
#include <thread>

#include "driver.h"

namespace {

using driver::check;
using driver::expect;
using driver::Pool;
using driver::Random;
using driver::Tensor;

// ggml's numbers; gaps are types without weights.
constexpr int32_t kTypes[] = {0,  1,  2,  3,  6,  7,  8,  10, 11, 12, 13, 14,
                              16, 17, 18, 19, 20, 21, 22, 23, 29, 30, 39};
constexpr int32_t kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ8_0 = 8, kQ4_K = 12, kQ6_K = 14, kBF16 = 30;
constexpr int32_t kThreads = 3;

bool is_float(int32_t type) { return type == kF32 || type == kF16 || type == kBF16; }

// Activations are rounded to int8 (a 127th); an AMX tile takes them as two bf16 halves.
double tolerance(int32_t type) { return is_float(type) ? 2e-5 : 2e-2; }

class Matrix {
 public:
  Matrix(const Pool& pool, const Tensor& tensor) {
    check(kt_matrix_create(pool.get(), &tensor.head, &matrix_), "kt_matrix_create");
  }
  ~Matrix() { kt_matrix_destroy(matrix_); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  kt_matrix* get() const { return matrix_; }

 private:
  kt_matrix* matrix_ = nullptr;
};

std::vector<double> product(const Tensor& w, int32_t expert, const float* x, int64_t num_rows) {
  const int64_t rows = w.head.rows, cols = w.head.cols;
  const float* weights = &w.values[static_cast<size_t>(expert * rows * cols)];
  std::vector<double> out(static_cast<size_t>(num_rows * rows));
  for (int64_t t = 0; t < num_rows; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < cols; ++c) {
        sum += double{weights[r * cols + c]} * x[t * cols + c];
      }
      out[static_cast<size_t>(t * rows + r)] = sum;
    }
  }
  return out;
}

// 37 rows: two whole bands and a part of one; 2 experts.
void matrices(const Pool& pool, int32_t isa, int32_t type) {
  constexpr int32_t kRows = 37, kExperts = 2, kMost = 21;
  auto info = driver::sized<kt_type_info>();
  check(kt_type_query(type, &info), "kt_type_query");
  const int32_t cols = info.block_size == 256 ? 512 : info.block_size == 32 ? 288 : 295;
  Random random(static_cast<uint64_t>(type) + 1);
  const Tensor tensor = driver::random_tensor(random, type, kExperts, kRows, cols);
  const Matrix matrix(pool, tensor);
  std::vector<uint8_t> back(tensor.bytes.size());
  check(kt_matrix_unpack(matrix.get(), back.data(), tensor.head.num_bytes), "kt_matrix_unpack");
  expect(back == tensor.bytes, std::string(info.name) + ": unpacked bytes differ");
  const std::vector<float> x = driver::uniform(random, int64_t{kMost} * cols);
  for (const int32_t count : {1, 2, 5, 8, kMost}) {
    std::vector<float> out(static_cast<size_t>(count) * kRows);
    const std::vector<double> expected = product(tensor, 1, x.data(), count);
    for (const int32_t is_prompt : {0, 1}) {
      check(kt_matrix_multiply(matrix.get(), 1, x.data(), count, out.data(), is_prompt),
            "kt_matrix_multiply");
      const double wrong = driver::error(out, expected);
      expect(wrong < tolerance(type), std::string(info.name) + " isa " + std::to_string(isa) +
                                          ", " + std::to_string(count) + " rows: wrong by " +
                                          std::to_string(wrong));
    }
  }
}

struct Layer {
  static constexpr int32_t kHidden = 512, kInner = 256, kExperts = 6, kTopK = 3;
  Tensor gate, up, down;

  Layer(Random& random, int32_t up_type, int32_t down_type)
      : gate(driver::random_tensor(random, up_type, kExperts, kInner, kHidden, 0.25f)),
        up(driver::random_tensor(random, up_type, kExperts, kInner, kHidden, 0.25f)),
        down(driver::random_tensor(random, down_type, kExperts, kHidden, kInner, 0.25f)) {}
};

struct Inputs {
  int32_t tokens;
  std::vector<float> x, weights;
  std::vector<int32_t> ids;
  std::vector<uint8_t> is_prompt;  // two of three tokens

  Inputs(Random& random, int32_t count) : tokens(count) {
    x = driver::uniform(random, int64_t{count} * Layer::kHidden);
    weights = driver::uniform(random, int64_t{count} * Layer::kTopK);
    for (int32_t t = 0; t < count; ++t) {
      is_prompt.push_back(t % 3 == 0 ? 0 : 1);
      const int32_t first = random.below(Layer::kExperts);  // then every second of 6: distinct
      for (int32_t k = 0; k < Layer::kTopK; ++k) {
        ids.push_back((first + 2 * k) % Layer::kExperts);
      }
    }
  }
};

std::vector<double> layer_twin(const Layer& layer, const Inputs& in) {
  std::vector<double> out(static_cast<size_t>(in.tokens) * Layer::kHidden);
  for (int32_t t = 0; t < in.tokens; ++t) {
    const float* x = &in.x[static_cast<size_t>(t) * Layer::kHidden];
    for (int32_t k = 0; k < Layer::kTopK; ++k) {
      const auto pair = static_cast<size_t>(t * Layer::kTopK + k);
      const int32_t expert = in.ids[pair];
      const std::vector<double> gate = product(layer.gate, expert, x, 1);
      const std::vector<double> up = product(layer.up, expert, x, 1);
      std::vector<float> mid(gate.size());
      for (size_t i = 0; i < gate.size(); ++i) {
        mid[i] = static_cast<float>(gate[i] / (1 + std::exp(-gate[i])) * up[i]);
      }
      const std::vector<double> down = product(layer.down, expert, mid.data(), 1);
      for (size_t i = 0; i < down.size(); ++i) {
        out[static_cast<size_t>(t) * Layer::kHidden + i] += double{in.weights[pair]} * down[i];
      }
    }
  }
  return out;
}

// The same layer as three matrices and as an expert set, by two callers at once.
void layers(const Pool& pool, int32_t isa, int32_t up_type, int32_t down_type) {
  Random random(static_cast<uint64_t>(up_type * 100 + down_type));
  const Layer layer(random, up_type, down_type);
  const Matrix gate(pool, layer.gate), up(pool, layer.up), down(pool, layer.down);
  kt_expert_set* set = nullptr;
  check(kt_expert_set_create(pool.get(), 40, Layer::kTopK, &set), "kt_expert_set_create");
  check(kt_expert_set_add(set, &layer.gate.head, &layer.up.head, &layer.down.head),
        "kt_expert_set_add");
  check(kt_expert_set_finish(set), "kt_expert_set_finish");
  const std::string name = "experts " + std::to_string(up_type) + "/" + std::to_string(down_type) +
                           " isa " + std::to_string(isa);
  for (const int32_t tokens : {1, 2, 9, 40}) {
    const Inputs in(random, tokens);
    std::vector<float> out(in.x.size()), again(in.x.size()), from_set(in.x.size());
    const auto run = [&](std::vector<float>& to) {
      check(kt_experts_multiply(gate.get(), up.get(), down.get(), in.x.data(), in.ids.data(),
                                in.weights.data(), tokens, Layer::kTopK, to.data(),
                                in.is_prompt.data()),
            "kt_experts_multiply");
    };
    std::thread other([&] { run(again); });
    run(out);
    other.join();
    check(kt_expert_set_run(set, 0, tokens, in.x.data(), in.ids.data(), in.weights.data(),
                            from_set.data(), in.is_prompt.data()),
          "kt_expert_set_run");
    // Three products in a row, each with its rounding of the activations.
    const double wrong = driver::error(out, layer_twin(layer, in));
    expect(wrong < 3 * std::max(tolerance(up_type), tolerance(down_type)),
           name + ", " + std::to_string(tokens) + " tokens: wrong by " + std::to_string(wrong));
    expect(out == again, name + ": two callers got different results");
    expect(out == from_set, name + ": the expert set gives something else");
  }
  check(kt_expert_set_destroy(set), "kt_expert_set_destroy");
}

// So many experts that the last bands of the down matrix are cut into segments, which different
// workers compute: the same bits as from one worker.
void segments(int32_t isa) {
  constexpr int32_t kExperts = 40, kHidden = 320, kInner = 64, kTopK = 8, kTokens = 9;
  Random random(7);
  const Tensor gate = driver::random_tensor(random, kF32, kExperts, kInner, kHidden, 0.25f);
  const Tensor up = driver::random_tensor(random, kF32, kExperts, kInner, kHidden, 0.25f);
  const Tensor down = driver::random_tensor(random, kF32, kExperts, kHidden, kInner, 0.25f);
  const std::vector<float> x = driver::uniform(random, int64_t{kTokens} * kHidden);
  const std::vector<float> weights = driver::uniform(random, int64_t{kTokens} * kTopK);
  std::vector<int32_t> ids;
  for (int32_t t = 0; t < kTokens; ++t) {
    const int32_t first = random.below(kExperts);
    for (int32_t k = 0; k < kTopK; ++k) {
      ids.push_back((first + 3 * k) % kExperts);
    }
  }
  std::vector<float> expected;
  for (const int32_t threads : {1, kThreads}) {
    const Pool pool(threads, isa);
    const Matrix packed[3] = {{pool, gate}, {pool, up}, {pool, down}};
    for (int round = 0; round < 20; ++round) {
      std::vector<float> out(x.size());
      check(kt_experts_multiply(packed[0].get(), packed[1].get(), packed[2].get(), x.data(),
                                ids.data(), weights.data(), kTokens, kTopK, out.data(), nullptr),
            "kt_experts_multiply");
      if (expected.empty()) {
        expected = out;
      }
      expect(out == expected, "segments of isa " + std::to_string(isa) + ": other bits");
    }
  }
}

// What must be refused with a message, and leave everything usable.
void refusals(const Pool& pool) {
  Random random(99);
  const Tensor tensor = driver::random_tensor(random, kQ4_K, 2, 16, 256);
  const Matrix good(pool, tensor);
  kt_matrix* none = nullptr;
  const auto create = [&](int32_t type, int32_t rows, int32_t cols, int64_t num_bytes) {
    kt_tensor bad = tensor.head;
    bad.type = type;
    bad.rows = rows;
    bad.cols = cols;
    bad.num_bytes = num_bytes;
    return kt_matrix_create(pool.get(), &bad, &none);
  };
  const int64_t bytes = tensor.head.num_bytes;
  driver::refused(create(9999, 16, 256, bytes), KT_ERR_UNSUPPORTED, "9999", "unknown type");
  driver::refused(create(kQ4_K, 16, 256, bytes - 1), KT_ERR_ARGUMENT, "num_bytes", "short tensor");
  driver::refused(create(kQ4_K, 16, 255, bytes), KT_ERR_ARGUMENT, "multiple", "broken row");
  driver::refused(create(kQ4_K, 0, 256, 0), KT_ERR_ARGUMENT, "at least 1", "no rows");
  driver::refused(create(kQ4_K, -1, 256, bytes), KT_ERR_ARGUMENT, "at least 1", "negative rows");
  std::vector<float> x(256), out(16);
  for (const int32_t expert : {-1, 2, INT32_MAX, INT32_MIN}) {
    driver::refused(kt_matrix_multiply(good.get(), expert, x.data(), 1, out.data(), 0),
                    KT_ERR_ARGUMENT, "expert is", "expert out of range");
  }
  driver::refused(kt_matrix_multiply(good.get(), 0, x.data(), -1, out.data(), 0), KT_ERR_ARGUMENT,
                  "num_rows is -1", "negative rows of x");
  expect(kt_matrix_multiply(good.get(), 0, nullptr, 0, nullptr, 0) == KT_OK, "zero rows");
}

}  // namespace

int main(int argc, char** argv) {
  for (const int32_t isa : driver::isas(argc, argv)) {
    for (const int32_t nodes : {0, 2}) {
      const Pool pool(kThreads, isa, nodes);
      for (const int32_t type : kTypes) {
        if (nodes == 0) {
          matrices(pool, isa, type);
        }
      }
      layers(pool, isa, kQ4_K, kQ6_K);
      layers(pool, isa, kQ8_0, kQ8_0);
      layers(pool, isa, kBF16, kF16);
      layers(pool, isa, kQ4_0, kQ4_K);
    }
    segments(isa);
    refusals(Pool(2, isa));
  }
  return driver::result();
}
