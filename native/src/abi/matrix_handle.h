// matrix_handle.h: what a kt_matrix handle owns. Shared by the entry points that take one.
#pragma once

#include <cstdint>

#include "base/arena.h"
#include "host/workers.h"
#include "kernels/kernels.h"
#include "kt.h"

// Packed weights and the pool that multiplies them. Immutable after creation.
struct kt_matrix {
  kt_pool* pool = nullptr;
  kt::Matrix view;  // view.data points into `memory`
  kt::Arena memory;
  int64_t gguf_bytes = 0;  // size of the source tensor
};
