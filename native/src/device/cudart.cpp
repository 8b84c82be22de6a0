#include "device/cudart.h"

#include <dlfcn.h>

#include <string>

#include "base/error.h"

namespace kt {
namespace {

template <class Function>
void find(void* library, const char* name, Function& out) {
  out = reinterpret_cast<Function>(dlsym(library, name));
  if (out == nullptr) {
    fail_unsupported(std::string("the CUDA runtime has no ") + name);
  }
}

template <class Function>
void find_optional(void* library, const char* name, Function& out) {
  out = library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, name));
}

Cudart load() {
  void* library = nullptr;
  for (const char* name : {"libcudart.so.13", "libcudart.so.12", "libcudart.so"}) {
    // RTLD_NOLOAD: only the runtime PyTorch uses will do, a second one has contexts of its own.
    library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library != nullptr) {
      break;
    }
  }
  if (library == nullptr) {
    fail_unsupported("no CUDA runtime is loaded in this process");
  }
  Cudart calls{};
  find(library, "cudaMemcpyAsync", calls.memcpy_async);
  find(library, "cudaGraphLaunch", calls.graph_launch);
  find(library, "cudaStreamQuery", calls.stream_query);
  find(library, "cudaStreamSynchronize", calls.stream_synchronize);
  find(library, "cudaGetErrorString", calls.error_string);
  find_optional(library, "cudaLaunchHostFunc", calls.launch_host_func);
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  find_optional(driver, "cuStreamWaitValue32_v2", calls.stream_wait_value);
  return calls;
}

}  // namespace

const Cudart& cudart() {
  static const Cudart calls = load();
  return calls;
}

void check_cuda(int status, const char* call) {
  if (status != 0) {
    throw Error(KT_ERR_INTERNAL, std::string(call) + ": " + cudart().error_string(status));
  }
}

void copy_to_device(void* stream, const kt_copy* copies, int32_t num_copies) {
  const Cudart& cuda = cudart();
  for (int32_t i = 0; i < num_copies; ++i) {
    const kt_copy& copy = copies[i];
    if (copy.num_bytes < 0) {
      fail_argument("copy " + std::to_string(i) + " has " + std::to_string(copy.num_bytes) +
                    " bytes");
    }
    check_cuda(cuda.memcpy_async(copy.to, copy.from, static_cast<size_t>(copy.num_bytes),
                                 kHostToDevice, stream),
               "cudaMemcpyAsync");
  }
}

}  // namespace kt
