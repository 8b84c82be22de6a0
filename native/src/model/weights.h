// Weights of a program: packed matrices split over NUMA nodes, small f32 vectors, borrowed tables.
//
// A packed matrix is cut by bands of 16 output rows into one part per node. Each part is a Matrix
// of its own, written (first touch) by the node's workers and later read only by them, so no byte
// is stored twice and none crosses the sockets during decoding.
#pragma once

#include <cstdint>
#include <vector>

#include "base/arena.h"
#include "host/workers.h"
#include "kernels/kernels.h"
#include "kernels/vector.h"
#include "kt.h"

namespace kt {

struct WeightPart {
  Matrix matrix;
  int32_t first_band = 0;  // of the whole matrix
};

struct Weight {
  int32_t kind = KT_WEIGHT_MATRIX;
  int32_t type = 0;
  int32_t num_experts = 1;
  int32_t rows = 0;
  int32_t cols = 0;
  ActKind act = kActF32;
  std::vector<WeightPart> parts;      // MATRIX: one per node, or a single shared one
  const float* values = nullptr;      // VECTOR: [num_experts * rows * cols]
  const uint8_t* borrowed = nullptr;  // BORROW: GGUF bytes
  int64_t row_bytes = 0;              // BORROW
  int64_t packed_bytes = 0;

  int64_t size() const { return int64_t{num_experts} * rows * cols; }
};

// "Q4_K [128, 768, 2048]", for messages.
std::string describe_weight(const Weight& weight);

// Checks the tensor and stores it; KT_WEIGHT_MATRIX is packed by all workers.
Weight make_weight(Workers& workers, Arena& arena, const kt_tensor& tensor, int32_t kind);

// Row-major f32 copy of a MATRIX or VECTOR weight with one expert (routers).
const float* unpack_values(Workers& workers, Arena& arena, const Weight& weight);

// The workers that own a part: those of its node, or all of them for a single shared part.
inline Range part_workers(const Workers& workers, size_t num_parts, size_t part) {
  if (num_parts == 1) {
    return {0, workers.num_threads()};
  }
  return workers.workers_of(static_cast<int32_t>(part));
}
inline size_t part_of_worker(const Workers& workers, size_t num_parts, int32_t worker) {
  return num_parts == 1 ? 0 : static_cast<size_t>(workers.node_of(worker));
}

}  // namespace kt
