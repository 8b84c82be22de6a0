#include "device/handoff.h"

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "base/error.h"
#include "device/cudart.h"

namespace kt {
namespace {

constexpr int64_t kFlagStride = 16;  // uint32 words: one flag per cache line
constexpr int kSpinsPerCheck = 4096;
constexpr uint32_t kReady = 1, kFailed = 2;  // values of a done flag

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
  if (config.mechanism < KT_HANDOFF_SPIN || config.mechanism > KT_HANDOFF_HOST_CALL) {
    fail_argument("mechanism is " + std::to_string(config.mechanism) + "; valid are 0 to 2");
  }
  if (experts == nullptr && config.num_layers == 0) {
    return;
  }
  if (experts != nullptr && config.num_layers != experts->num_layers()) {
    fail_argument("num_layers is " + std::to_string(config.num_layers) + ", the expert set has " +
                  std::to_string(experts->num_layers()));
  }
  for (const void* buffer :
       {static_cast<const void*>(config.x), static_cast<const void*>(config.ids),
        static_cast<const void*>(config.weights), static_cast<const void*>(config.out),
        static_cast<const void*>(config.request), static_cast<const void*>(config.done)}) {
    require_handle(buffer, "a hand-off buffer");
  }
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    calls_.push_back({this, layer});
  }
}

void Handoff::await(int32_t layer, void* stream) {
  if (layer < 0 || layer >= config_.num_layers) {
    fail_argument("layer is " + std::to_string(layer) + " of " +
                  std::to_string(config_.num_layers));
  }
  HostCall& call = calls_[static_cast<size_t>(layer)];
  if (config_.mechanism == KT_HANDOFF_HOST_CALL) {
    if (cudart().launch_host_func == nullptr) {
      fail_unsupported("the CUDA runtime has no cudaLaunchHostFunc");
    }
    check_cuda(cudart().launch_host_func(stream, compute, &call), "cudaLaunchHostFunc");
  } else if (config_.mechanism == KT_HANDOFF_WAIT_VALUE) {
    if (cudart().stream_wait_value == nullptr) {
      fail_unsupported("the CUDA driver has no cuStreamWaitValue32");
    }
    // A driver call: its codes are not those of the runtime, so the number must do.
    const auto address = reinterpret_cast<uint64_t>(config_.done + layer * kFlagStride);
    const int status = cudart().stream_wait_value(stream, address, kReady, kWaitGreaterEqual);
    if (status != 0) {
      throw Error(KT_ERR_INTERNAL, "cuStreamWaitValue32 failed with " + std::to_string(status));
    }
  }
}

// Runs on a thread of the CUDA runtime, in stream order; must not call CUDA.
void Handoff::compute(void* call) {
  const auto* self = static_cast<HostCall*>(call);
  Handoff& handoff = *self->handoff;
  const kt_handoff_config& config = handoff.config_;
  uint32_t state = kFailed;
  if (handoff.step_ != nullptr && handoff.failure_ == nullptr) {
    try {
      handoff.answer(*handoff.step_, self->layer);
      handoff.num_answered_ = self->layer + 1;
      state = kReady;
    } catch (...) {
      handoff.failure_ = std::current_exception();
    }
  }
  flag(config.done, self->layer).store(state, std::memory_order_release);
}

void Handoff::run(kt_gpu_step& step) {
  step.expert_ns = 0;
  if (config_.num_layers > 0 && step.num_tokens > config_.max_tokens) {
    fail_argument("num_tokens is " + std::to_string(step.num_tokens) + ", the hand-off holds " +
                  std::to_string(config_.max_tokens));
  }
  const bool asks = config_.num_layers > 0 && step.num_tokens > 0;
  if (asks && config_.mechanism == KT_HANDOFF_HOST_CALL) {
    step_ = &step;
    num_answered_ = 0;
    failure_ = nullptr;
    launch(step);
    finish_host_calls();
    return;
  }
  launch(step);
  if (asks) {
    serve(step);
  }
  check_cuda(cudart().stream_synchronize(step.stream), "cudaStreamSynchronize");
}

void Handoff::launch(kt_gpu_step& step) {
  const Cudart& cuda = cudart();
  if (step.block_bytes > 0) {
    check_cuda(cuda.memcpy_async(step.block_device, step.block_host,
                                 static_cast<size_t>(step.block_bytes), kHostToDevice, step.stream),
               "cudaMemcpyAsync");
  }
  check_cuda(cuda.graph_launch(step.graph_exec, step.stream), "cudaGraphLaunch");
  if (step.results_bytes > 0) {
    check_cuda(
        cuda.memcpy_async(step.results_host, step.results_device,
                          static_cast<size_t>(step.results_bytes), kDeviceToHost, step.stream),
        "cudaMemcpyAsync");
  }
}

void Handoff::finish_host_calls() {
  const int status = cudart().stream_synchronize(step_->stream);
  step_ = nullptr;
  check_cuda(status, "cudaStreamSynchronize");
  if (failure_ != nullptr) {
    std::rethrow_exception(failure_);
  }
  if (num_answered_ != config_.num_layers) {
    throw Error(KT_ERR_INTERNAL, "the GPU did not ask for the experts of layer " +
                                     std::to_string(num_answered_) + ": it has ended");
  }
}

// Computes a layer whose request is there.
void Handoff::answer(kt_gpu_step& step, int32_t layer) {
  const int64_t begin = now_ns();
  if (step.asked_ns != nullptr) {
    step.asked_ns[layer] = begin;
  }
  if (experts_ != nullptr) {
    experts_->run(layer, step.num_tokens, config_.x, config_.ids, config_.weights, nullptr,
                  config_.out);
    step.expert_ns += now_ns() - begin;
  }
}

void Handoff::serve(kt_gpu_step& step) {
  int32_t layer = 0;
  try {
    for (; layer < config_.num_layers; ++layer) {
      if (!wait_for_request(layer, step, now_ns() + step.timeout_ns)) {
        throw Error(KT_ERR_INTERNAL, "the GPU did not ask for the experts of layer " +
                                         std::to_string(layer) +
                                         ": it has ended or takes more than " +
                                         std::to_string(step.timeout_ns / 1000000) + " ms");
      }
      answer(step, layer);
      flag(config_.done, layer).store(kReady, std::memory_order_release);
    }
  } catch (...) {
    release_all(layer);
    // A graph that still runs must find its answers: then the flags stay, and so does the failure.
    if (drain(step.stream, now_ns() + step.timeout_ns)) {
      for (int32_t l = 0; l < config_.num_layers; ++l) {
        flag(config_.request, l).store(0);
        flag(config_.done, l).store(0);
      }
    }
    throw;
  }
}

// Lets the graph run out; false when it has not after the time limit (a GPU that hangs).
bool Handoff::drain(void* stream, int64_t deadline_ns) {
  while (cudart().stream_query(stream) == kNotReady) {
    if (now_ns() > deadline_ns) {
      return false;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
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
      if (status == 0 && request.load(std::memory_order_acquire) == 0) {
        return false;
      }
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
    flag(config_.done, layer).store(kFailed, std::memory_order_release);
  }
}

}  // namespace kt
