// The few CUDA runtime calls that a decode step needs, found in the runtime that is already loaded
// into the process (PyTorch's). No CUDA headers, no link-time dependency; a machine without CUDA
// never comes here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kt.h"

namespace kt {

struct Cudart {
  int (*memcpy_async)(void* dst, const void* src, size_t bytes, int kind, void* stream);
  int (*graph_launch)(void* graph_exec, void* stream);
  int (*stream_query)(void* stream);
  int (*stream_synchronize)(void* stream);
  const char* (*error_string)(int error);
  // The two below may be missing (nullptr): only fallbacks of the hand-off need them.
  int (*launch_host_func)(void* stream, void (*function)(void*), void* data);
  int (*stream_wait_value)(void* stream, uint64_t address, uint32_t value, unsigned flags);
};

inline constexpr int kHostToDevice = 1;
inline constexpr int kDeviceToHost = 2;
inline constexpr unsigned kWaitGreaterEqual = 0;  // CU_STREAM_WAIT_VALUE_GEQ
inline constexpr int kNotReady = 600;             // cudaErrorNotReady

// Throws kt::Error (KT_ERR_UNSUPPORTED) when no CUDA runtime is loaded.
const Cudart& cudart();

// Throws kt::Error naming the call when status is not cudaSuccess.
void check_cuda(int status, const char* call);

// See kt_copy_to_device.
void copy_to_device(void* stream, const kt_copy* copies, int32_t num_copies);

}  // namespace kt
