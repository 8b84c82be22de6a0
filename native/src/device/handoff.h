// One decode step on the GPU with its routed experts on the CPU.
//
// DESIGN
//  The graph contains, per MoE layer, a signal kernel and a wait kernel (native/cuda/step.cu). All
//  layers share one set of pinned buffers, because layer l + 1 is signalled only after layer l's
//  result was taken; the flags are per layer, one cache line each.
//    GPU: writes x, ids, weights; fence; request[l] = 1 (release, system scope)
//    CPU: sees request[l] (acquire), clears it, computes, writes out; done[l] = 1 (release), or 2
//         when it failed
//    GPU: sees done[l] (acquire, or gives up after a time limit), adds out, clears done[l]
//  Both flags are thus zero again when the step ends. The engine thread itself polls, as worker 0
//  of the pool: no other thread has to be woken for the first layer, and nothing spins between
//  steps.
//  That is KT_HANDOFF_SPIN. A kernel that spins is unwelcome on some machines (a GPU that also
//  draws a desktop, a driver that resets a device that seems to hang, a debugger), and flags
//  written by a kernel may not reach the CPU in time on others. Then the same kernels stay, and
//    KT_HANDOFF_WAIT_VALUE puts a stream wait for done[l] >= 1 in front of the second kernel, which
//      so finds the flag raised;
//    KT_HANDOFF_HOST_CALL puts a host function in front of the second kernel, which computes the
//      experts itself on the CUDA runtime's thread; the first kernel's flag points elsewhere. The
//      engine thread must not be needed: launching a graph of many host functions may block until
//      most of them have run.
//  If the CPU gives up (time limit, failed stream), all layers still to come are answered with 2,
//  so that the graph runs out instead of waiting for its own limit 48 times.
#pragma once

#include <cstdint>
#include <exception>
#include <vector>

#include "experts/expert_set.h"
#include "kt.h"

namespace kt {

class Handoff {
 public:
  // experts may be nullptr: steps then have no CPU part. Buffers are borrowed until destruction.
  Handoff(const kt_handoff_config& config, ExpertSet* experts);
  Handoff(const Handoff&) = delete;  // graphs hold the address
  Handoff& operator=(const Handoff&) = delete;
  // [engine] Copies the block, launches the graph, serves the experts, copies the results, waits.
  void run(kt_gpu_step& step);
  // [setup] See kt_handoff_await.
  void await(int32_t layer, void* stream);

 private:
  // What a host function of the stream needs; its address is part of the graph.
  struct HostCall {
    Handoff* handoff;
    int32_t layer;
  };
  static void compute(void* call);

  void launch(kt_gpu_step& step);
  void answer(kt_gpu_step& step, int32_t layer);
  void finish_host_calls();

  void serve(kt_gpu_step& step);
  static bool drain(void* stream, int64_t deadline_ns);
  bool wait_for_request(int32_t layer, const kt_gpu_step& step, int64_t deadline_ns);
  void release_all(int32_t first_layer);

  kt_handoff_config config_;
  ExpertSet* experts_;
  std::vector<HostCall> calls_;  // by layer; never resized
  // Of a step with host functions, which alone touch them between its launch and its end.
  kt_gpu_step* step_ = nullptr;
  int32_t num_answered_ = 0;
  std::exception_ptr failure_;
};

}  // namespace kt
