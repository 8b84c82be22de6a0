#include "device/handoff.h"

#include <atomic>
#include <chrono>
#include <string>

#include "base/error.h"
#include "device/cudart.h"

namespace kt {
namespace {

constexpr int64_t kFlagStride = 16;  // uint32 words: one flag per cache line
constexpr int kSpinsPerCheck = 4096;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::atomic_ref<uint32_t> flag(uint32_t* flags, int32_t layer) {
  return std::atomic_ref<uint32_t>(flags[layer * kFlagStride]);
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Handoff::Handoff(const kt_handoff_config& config, ExpertSet* experts)
    : config_(config), experts_(experts) {
  if (experts == nullptr) {
    return;
  }
  if (config.num_layers != experts->num_layers()) {
    fail_argument("num_layers is " + std::to_string(config.num_layers) + ", the expert set has " +
                  std::to_string(experts->num_layers()));
  }
  for (const void* buffer :
       {static_cast<const void*>(config.x), static_cast<const void*>(config.ids),
        static_cast<const void*>(config.weights), static_cast<const void*>(config.out),
        static_cast<const void*>(config.request), static_cast<const void*>(config.done)}) {
    require_handle(buffer, "a hand-off buffer");
  }
}

void Handoff::run(kt_gpu_step& step) {
  const Cudart& cuda = cudart();
  step.expert_ns = 0;
  if (experts_ != nullptr && step.num_tokens > config_.max_tokens) {
    fail_argument("num_tokens is " + std::to_string(step.num_tokens) + ", the hand-off holds " +
                  std::to_string(config_.max_tokens));
  }
  check_cuda(cuda.memcpy_async(step.block_device, step.block_host,
                               static_cast<size_t>(step.block_bytes), kHostToDevice, step.stream),
             "cudaMemcpyAsync");
  check_cuda(cuda.graph_launch(step.graph_exec, step.stream), "cudaGraphLaunch");
  check_cuda(cuda.memcpy_async(step.results_host, step.results_device,
                               static_cast<size_t>(step.results_bytes), kDeviceToHost, step.stream),
             "cudaMemcpyAsync");
  if (experts_ != nullptr && step.num_tokens > 0) {
    serve(step);
  }
  check_cuda(cuda.stream_synchronize(step.stream), "cudaStreamSynchronize");
}

void Handoff::serve(kt_gpu_step& step) {
  int32_t layer = 0;
  try {
    for (; layer < config_.num_layers; ++layer) {
      if (!wait_for_request(layer, step, now_ns() + step.timeout_ns)) {
        throw Error(KT_ERR_INTERNAL, "the GPU did not ask for the experts of layer " +
                                         std::to_string(layer) + " within " +
                                         std::to_string(step.timeout_ns / 1000000) + " ms");
      }
      const int64_t begin = now_ns();
      experts_->run(layer, step.num_tokens, config_.x, config_.ids, config_.weights, config_.out);
      step.expert_ns += now_ns() - begin;
      flag(config_.done, layer).store(1, std::memory_order_release);
    }
  } catch (...) {
    release_all(layer);
    (void)cudart().stream_synchronize(step.stream);
    for (int32_t l = 0; l < config_.num_layers; ++l) {
      flag(config_.request, l).store(0);
      flag(config_.done, l).store(0);
    }
    throw;
  }
}

bool Handoff::wait_for_request(int32_t layer, const kt_gpu_step& step, int64_t deadline_ns) {
  std::atomic_ref<uint32_t> request = flag(config_.request, layer);
  for (int spins = 0;; ++spins) {
    if (request.load(std::memory_order_acquire) != 0) {
      request.store(0, std::memory_order_relaxed);
      return true;
    }
    pause();
    if (spins % kSpinsPerCheck == kSpinsPerCheck - 1) {
      // A stream that has ended, well or badly, will never ask again.
      const int status = cudart().stream_query(step.stream);
      if (status != 0 && status != kNotReady) {
        check_cuda(status, "the decode graph");
      }
      if (now_ns() > deadline_ns) {
        return false;
      }
    }
  }
}

void Handoff::release_all(int32_t first_layer) {
  for (int32_t layer = first_layer; layer < config_.num_layers; ++layer) {
    flag(config_.done, layer).store(2, std::memory_order_release);
  }
}

}  // namespace kt
