#include "kernels/pack_tensor.h"

#include <string>

#include "base/error.h"

namespace kt {

Matrix describe_matrix(const kt_tensor& tensor) {
  const TypeTraits* traits = type_traits(tensor.type);
  if (traits == nullptr) {
    fail_unsupported("tensor type " + std::to_string(tensor.type) + " has no kernel in this build");
  }
  const std::string shape = std::string(traits->name) + " tensor [" +
                            std::to_string(tensor.num_experts) + ", " +
                            std::to_string(tensor.rows) + ", " + std::to_string(tensor.cols) + "]";
  if (tensor.num_experts < 1 || tensor.rows < 1 || tensor.cols < 1) {
    fail_argument(shape + ": every dimension must be at least 1");
  }
  if (tensor.cols % traits->block_size != 0) {
    fail_argument(shape + ": " + std::to_string(tensor.cols) + " columns are not a multiple of " +
                  traits->name + "'s block of " + std::to_string(traits->block_size));
  }
  // 2^31 * 2^31 * 4 does not fit; 128 bits do, whatever the caller passes.
  const __int128 expected = static_cast<__int128>(tensor.num_experts) * tensor.rows *
                            (tensor.cols / traits->block_size) * traits->block_bytes;
  if (expected != tensor.num_bytes) {
    const std::string wanted = expected > INT64_MAX
                                   ? "more than any memory holds"
                                   : std::to_string(static_cast<int64_t>(expected));
    fail_argument(shape + ": num_bytes is " + std::to_string(tensor.num_bytes) + ", expected " +
                  wanted);
  }
  if (tensor.data == nullptr) {
    fail_argument(shape + ": data is NULL");
  }
  Matrix format;
  format.type = tensor.type;
  format.rows = tensor.rows;
  format.cols = tensor.cols;
  format.num_experts = tensor.num_experts;
  format.num_bands = (tensor.rows - 1) / kBandRows + 1;
  if (!matrix_format(tensor.type, tensor.cols, &format.act, &format.band_bytes)) {
    fail_internal(shape + ": no packed format");
  }
  format.expert_bytes = format.num_bands * format.band_bytes;
  return format;
}

void pack_bands(const kt_tensor& tensor, const Matrix& format, int64_t first, int64_t count,
                uint8_t* data) {
  const int64_t expert_source = tensor.num_bytes / tensor.num_experts;
  const int64_t row_bytes = expert_source / tensor.rows;
  const auto* source = static_cast<const uint8_t*>(tensor.data);
  for (int64_t index = first; index < first + count; ++index) {
    const int64_t expert = index / format.num_bands, band = index % format.num_bands;
    const int64_t left = tensor.rows - band * kBandRows;
    pack_band(tensor.type, tensor.cols,
              source + expert * expert_source + band * kBandRows * row_bytes, row_bytes,
              static_cast<int32_t>(left < kBandRows ? left : kBandRows),
              data + expert * format.expert_bytes + band * format.band_bytes);
  }
}

}  // namespace kt
