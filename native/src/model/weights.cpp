#include "model/weights.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"
#include "kernels/pack_tensor.h"

namespace kt {
namespace {

std::string shape_text(int32_t experts, int32_t rows, int32_t cols) {
  std::string text = "[";
  if (experts != 1) {
    text += std::to_string(experts) + ", ";
  }
  return text + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

// Packs the bands of every part; each worker takes a contiguous run of its own node's bands so that
// the pages it touches first stay on its node.
void pack_parts(Workers& workers, const kt_tensor& tensor, Weight& weight) {
  const int64_t expert_source = tensor.num_bytes / tensor.num_experts;
  const int64_t row_bytes = expert_source / tensor.rows;
  const auto* source = static_cast<const uint8_t*>(tensor.data);
  workers.for_each([&](int32_t worker) {
    const size_t p = part_of_worker(workers, weight.parts.size(), worker);
    const Range team = part_workers(workers, weight.parts.size(), p);
    const WeightPart& part = weight.parts[p];
    const Matrix& m = part.matrix;
    const Range bands =
        split(int64_t{m.num_bands} * m.num_experts, worker - team.first, team.last - team.first);
    for (int64_t index = bands.first; index < bands.last; ++index) {
      const auto expert = static_cast<int32_t>(index / m.num_bands);
      const auto band = static_cast<int32_t>(index % m.num_bands);
      const int64_t row = int64_t{part.first_band + band} * kBandRows;
      const int64_t left = std::min<int64_t>(tensor.rows - row, kBandRows);
      pack_band(m.type, m.cols, source + expert * expert_source + row * row_bytes, row_bytes,
                static_cast<int32_t>(left), const_cast<uint8_t*>(band_at(m, expert, band)));
    }
  });
}

void make_matrix(Workers& workers, Arena& arena, const kt_tensor& tensor, Weight& weight) {
  const Matrix whole = describe_matrix(tensor);
  weight.act = whole.act;
  const int32_t nodes = workers.num_nodes();
  // Parts begin at even bands: the expert layer works on pairs. A matrix with fewer pairs than
  // nodes stays in one piece.
  const int32_t pairs = (whole.num_bands + 1) / 2;
  const int32_t parts = pairs >= nodes ? nodes : 1;
  for (int32_t p = 0; p < parts; ++p) {
    Range bands = split(pairs, p, parts);
    bands = {2 * bands.first, std::min<int64_t>(2 * bands.last, whole.num_bands)};
    WeightPart part;
    part.first_band = static_cast<int32_t>(bands.first);
    part.matrix = whole;
    part.matrix.num_bands = static_cast<int32_t>(bands.last - bands.first);
    part.matrix.rows =
        std::min(whole.rows - part.first_band * kBandRows, part.matrix.num_bands * kBandRows);
    part.matrix.expert_bytes = part.matrix.num_bands * whole.band_bytes;
    const int64_t bytes = part.matrix.expert_bytes * whole.num_experts;
    part.matrix.data = arena.allocate(bytes);
    weight.packed_bytes += bytes;
    weight.parts.push_back(part);
  }
  pack_parts(workers, tensor, weight);
}

}  // namespace

std::string describe_weight(const Weight& weight) {
  const TypeTraits* traits = type_traits(weight.type);
  return std::string(traits != nullptr ? traits->name : "?") + " " +
         shape_text(weight.num_experts, weight.rows, weight.cols);
}

Weight make_weight(Workers& workers, Arena& arena, const kt_tensor& tensor, int32_t kind) {
  // Also for the kinds that are not packed: type, shape and size are checked in one place.
  const Matrix checked = describe_matrix(tensor);
  Weight weight;
  weight.kind = kind;
  weight.type = checked.type;
  weight.num_experts = checked.num_experts;
  weight.rows = checked.rows;
  weight.cols = checked.cols;
  switch (kind) {
    case KT_WEIGHT_MATRIX:
      make_matrix(workers, arena, tensor, weight);
      break;
    case KT_WEIGHT_VECTOR: {
      auto* values = arena.allocate_array<float>(weight.size());
      dequantize_row(tensor.type, static_cast<const uint8_t*>(tensor.data), weight.size(), values);
      weight.values = values;
      weight.packed_bytes = weight.size() * 4;
      break;
    }
    case KT_WEIGHT_BORROW:
      weight.borrowed = static_cast<const uint8_t*>(tensor.data);
      weight.row_bytes = tensor.num_bytes / tensor.num_experts / tensor.rows;
      break;
    default:
      fail_argument("weight kind is " + std::to_string(kind) + ", allowed is 0 .. 2");
  }
  return weight;
}

const float* unpack_values(Workers& workers, Arena& arena, const Weight& weight) {
  if (weight.kind == KT_WEIGHT_VECTOR) {
    return weight.values;
  }
  auto* values = arena.allocate_array<float>(weight.size());
  const TypeTraits* traits = type_traits(weight.type);
  const int64_t row_bytes = int64_t{weight.cols} / traits->block_size * traits->block_bytes;
  workers.for_each([&](int32_t worker) {
    if (worker != 0) {
      return;  // a router is a megabyte, once
    }
    std::vector<uint8_t> rows(static_cast<size_t>(row_bytes * kBandRows));
    for (const WeightPart& part : weight.parts) {
      for (int32_t band = 0; band < part.matrix.num_bands; ++band) {
        const int64_t row = int64_t{part.first_band + band} * kBandRows;
        const int64_t count = std::min<int64_t>(weight.rows - row, kBandRows);
        unpack_band(weight.type, weight.cols, band_at(part.matrix, 0, band), row_bytes,
                    static_cast<int32_t>(count), rows.data());
        dequantize_row(weight.type, rows.data(), count * weight.cols, values + row * weight.cols);
      }
    }
  });
  return values;
}

}  // namespace kt
