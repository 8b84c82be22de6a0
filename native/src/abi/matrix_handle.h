// matrix_handle.h: what a kt_matrix handle owns. Shared by the entry points that take one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernels/kernels.h"
#include "kt.h"

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};

// Packed weights and the pool that multiplies them. Immutable after creation.
struct kt_matrix {
  kt_pool* pool = nullptr;
  kt::Matrix view;  // view.data points into `data`
  std::unique_ptr<uint8_t, FreeDeleter> data;
  int64_t gguf_bytes = 0;  // size of the source tensor
};
