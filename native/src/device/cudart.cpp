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

}  // namespace kt
