// Shared by the drivers that use the library through kt.h alone: checks, random numbers, random
// tensors of any type. Header-only; each driver is one program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kt.h"

namespace driver {

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what.c_str());
    ++failures;
  }
}

// A call that has to work: anything later would be noise.
inline void check(int32_t status, const char* what) {
  if (status < 0) {
    std::fprintf(stderr, "%s: status %d: %s\n", what, static_cast<int>(status), kt_last_error());
    std::exit(1);
  }
}

// A call that has to be refused with this status and a message that holds `text`.
inline void refused(int32_t status, int32_t expected, const char* text, const char* what) {
  expect(status == expected, std::string(what) + " gave status " + std::to_string(status));
  const std::string message = kt_last_error();
  expect(message.find(text) != std::string::npos, std::string(what) + ": message is " + message);
}

// xorshift64*: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  int32_t below(int32_t n) {
    return static_cast<int32_t>((next() >> 33) % static_cast<uint64_t>(n));
  }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }  // -1 .. 1

 private:
  uint64_t state_;
};

inline std::vector<float> uniform(Random& random, int64_t count, float scale = 1.0f) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) {
    value = random.uniform() * scale;
  }
  return values;
}

template <typename T>
T sized() {
  T value = {};
  value.struct_size = sizeof(T);
  return value;
}

// Raw bytes in GGUF order and the weights they stand for.
struct Tensor {
  kt_tensor head = {};
  std::vector<uint8_t> bytes;
  std::vector<float> values;
};

// Random bits, block by block, until the decoded weights are of ordinary size: works for every
// type without knowing its scales. Few blocks are drawn; they repeat with an odd period.
inline Tensor random_tensor(Random& random, int32_t type, int32_t experts, int32_t rows,
                            int32_t cols, float limit = 2.0f) {
  auto info = sized<kt_type_info>();
  check(kt_type_query(type, &info), "kt_type_query");
  const int64_t weights = int64_t{experts} * rows * cols;
  const int64_t blocks = weights / info.block_size;
  const auto block_bytes = static_cast<size_t>(info.block_bytes);
  const auto block_size = static_cast<size_t>(info.block_size);
  std::vector<uint8_t> drawn(block_bytes * 61);
  std::vector<float> decoded(block_size);
  for (size_t b = 0; b < 61; ++b) {
    for (bool good = false; !good;) {
      for (size_t i = 0; i < block_bytes; ++i) {
        drawn[b * block_bytes + i] = static_cast<uint8_t>(random.next() >> 56);
      }
      check(kt_dequantize(type, &drawn[b * block_bytes], info.block_size, decoded.data()),
            "kt_dequantize");
      float largest = 0;
      for (const float value : decoded) {
        largest = std::isfinite(value) ? std::fmax(largest, std::fabs(value)) : 2 * limit;
        if (largest > limit) {
          break;
        }
      }
      good = largest <= limit && largest > limit / 64;
    }
  }
  Tensor tensor;
  tensor.bytes.resize(static_cast<size_t>(blocks) * block_bytes);
  for (size_t i = 0; i < tensor.bytes.size(); ++i) {
    tensor.bytes[i] = drawn[i % drawn.size()];
  }
  tensor.values.resize(static_cast<size_t>(weights));
  check(kt_dequantize(type, tensor.bytes.data(), weights, tensor.values.data()), "kt_dequantize");
  tensor.head = sized<kt_tensor>();
  tensor.head.type = type;
  tensor.head.num_experts = experts;
  tensor.head.rows = rows;
  tensor.head.cols = cols;
  tensor.head.num_bytes = static_cast<int64_t>(tensor.bytes.size());
  tensor.head.data = tensor.bytes.data();
  return tensor;
}

// A pool that is destroyed with its scope.
class Pool {
 public:
  Pool(int32_t threads, int32_t isa, int32_t nodes = 0) {
    auto config = sized<kt_pool_config>();
    config.num_threads = threads;
    config.isa = isa;
    config.spin_us = -1;
    config.fake_nodes = nodes;
    check(kt_pool_create(&config, &pool_), "kt_pool_create");
  }
  ~Pool() { kt_pool_destroy(pool_); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  kt_pool* get() const { return pool_; }

 private:
  kt_pool* pool_ = nullptr;
};

// Instruction sets of this machine, or the one named on the command line.
inline std::vector<int32_t> isas(int argc, char** argv) {
  if (argc > 1) {
    return {std::atoi(argv[1])};
  }
  auto info = sized<kt_host_info>();
  check(kt_host_query(&info), "kt_host_query");
  std::vector<int32_t> found;
  for (int32_t isa = KT_ISA_SCALAR; isa <= KT_ISA_AMX; ++isa) {
    if (((info.isa_mask >> isa) & 1u) != 0) {
      found.push_back(isa);
    }
  }
  return found;
}

// Norm of the difference over the norm of what is expected.
inline double error(const std::vector<float>& got, const std::vector<double>& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / size);
}

inline int result() {
  if (failures == 0) {
    std::puts("ok");
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace driver
