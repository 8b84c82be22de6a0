// pack_tensor.h: checks a kt_tensor and packs it, band by band, into memory of the caller's choice.
#pragma once

#include "kernels/kernels.h"
#include "kt.h"

namespace kt {

// The packed form a tensor will take: every field of Matrix but `data`. Throws Error with the
// numbers when type, shape or num_bytes do not agree.
Matrix describe_matrix(const kt_tensor& tensor);

// Packs bands [first, first + count) of all num_experts * num_bands bands (expert-major) into
// `data` (expert_bytes * num_experts bytes, 64-byte aligned). Disjoint ranges may run in parallel.
void pack_bands(const kt_tensor& tensor, const Matrix& format, int64_t first, int64_t count,
                uint8_t* data);

}  // namespace kt
