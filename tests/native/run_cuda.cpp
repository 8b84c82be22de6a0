// run_cuda.cpp: the CUDA kernels for packed weights as a CPU library; see emulated_cuda.h. Compiled
// with KT_TYPES(X) naming the ggml types.
#include "emulated_cuda.h"
// base.cu is replaced by the header above.
#include "../../native/cuda/formats.cu"
#include "../../native/cuda/linear.cu"
#include "../../native/cuda/prompt_experts.cu"

// arguments: their addresses, as cuLaunchKernel takes them. 0: no such kernel.
extern "C" int launch(const char* name, unsigned x, unsigned y, unsigned threads,
                      void** arguments) {
#define KT_KERNEL(kernel)                               \
  if (std::strcmp(name, #kernel) == 0) {                \
    emulated::launch(kernel, x, y, threads, arguments); \
    return 1;                                           \
  }
  KT_KERNEL(multiply_1_1)
  KT_KERNEL(multiply_1_2)
  KT_KERNEL(multiply_8_1)
  KT_KERNEL(multiply_8_2)
  KT_KERNEL(multiply_16_1)
  KT_KERNEL(multiply_16_2)
  KT_KERNEL(group_pairs)
  KT_KERNEL(experts_gate_up_1)
  KT_KERNEL(experts_gate_up_n)
  KT_KERNEL(experts_down_1)
  KT_KERNEL(experts_down_n)
  KT_KERNEL(dequantize)
  KT_KERNEL(prompt_products)
  KT_KERNEL(prompt_gate_up)
  KT_KERNEL(silu_mul_rows)
  return 0;
}
