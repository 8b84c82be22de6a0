// prefill.cu: routed experts of many rows, around their products. Follows step.cu.
//
// A pair is one (token, expert) of the step. group_rows_by_expert sorts the pairs that the GPU
// computes by expert, in pair order within an expert; prompt_experts.cu multiplies rows in that
// order, and `ends` bounds each expert's.

constexpr int kNobody = -1;  // position of a pair that somebody else computes and adds
constexpr int kHost = -2;    // position of a pair whose token's row waits in host memory

// One block of 256 threads per expert. gpu_computes: [experts] bytes, or null for all (may lie in
// pinned host memory). order: pair of each sorted row. position: [pairs] sorted row, kNobody or
// kHost. ends: [experts] one past the last row of an expert.
extern "C" __global__ void __launch_bounds__(256)
    group_rows_by_expert(const int* ids, int pairs, int experts, const u8* gpu_computes, int* order,
                         int* position, int* ends) {
  release_next();
  wait_for_previous();
  __shared__ u8 wanted[1024];
  __shared__ int before_warp[9], before_expert;
  const int e = blockIdx.x, t = threadIdx.x, lane = t & 31, warp = t >> 5;
  for (int i = t; i < experts; i += 256) {
    wanted[i] = gpu_computes == nullptr ? 1 : gpu_computes[i];
  }
  if (t == 0) {
    before_expert = 0;
  }
  __syncthreads();
  int before = 0;
  for (int i = t; i < pairs; i += 256) {
    const int id = ids[i];
    before += id >= 0 && id < e && wanted[id];
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    before += __shfl_xor_sync(~0u, before, s);
  }
  if (lane == 0 && before > 0) {
    atomicAdd(&before_expert, before);  // integers: the order does not matter
  }
  __syncthreads();
  int at = before_expert;
  for (int first = 0; first < pairs; first += 256) {
    const int i = first + t, id = i < pairs ? ids[i] : -1;
    const bool mine = id == e;
    if (e == 0 && i < pairs && id < 0) {
      position[i] = kNobody;
    }
    const u32 votes = __ballot_sync(~0u, mine);
    if (lane == 0) {
      before_warp[warp + 1] = __popc(votes);
    }
    __syncthreads();
    if (mine && !wanted[e]) {
      position[i] = kHost;
    } else if (mine) {
      int to = at + __popc(votes & ((1u << lane) - 1));
      for (int w = 1; w <= warp; ++w) {
        to += before_warp[w];
      }
      order[to] = i;
      position[i] = to;
    }
    for (int w = 1; w <= 8; ++w) {
      at += before_warp[w];
    }
    __syncthreads();
  }
  if (t == 0) {
    ends[e] = wanted[e] ? at : before_expert;
  }
}

// Tells the host that everything before it on the stream is done. One thread.
extern "C" __global__ void raise_flag(u32* flag, u32 number) {
  wait_for_previous();
  __threadfence_system();
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(number) : "memory");
  release_next();
}

// Waits until the host's *done is `number`: its rows are complete. With the highest bit set they
// never will be, which leaves 2 in *state; after `limit` clock ticks it leaves 3. One thread: the
// kernels after it wait for it without holding multiprocessors.
extern "C" __global__ void wait_for_host(const u32* done, u32* state, u32 number, i64 limit) {
  wait_for_previous();
  const i64 begin = clock64();
  while (true) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(done) : "memory");
    if (value == number) {
      break;
    }
    const bool failed = value == (number | 0x80000000u);
    if (failed || clock64() - begin > limit) {
      *state = failed ? 2 : 3;
      break;
    }
  }
  release_next();
}

// out[t] = residual[t] + sum over k, in order, of weight[t, k] * y[position of pair], then the row
// that host memory holds for the token, if one of its pairs was computed there. grid = (T, n).
extern "C" __global__ void sum_rows(const u16* y, const int* position, const float* weight,
                                    int top_k, int cols, const float* host, const float* residual,
                                    float* out) {
  release_next();
  wait_for_previous();
  const i64 token = blockIdx.x;
  for (int c = 2 * (blockIdx.y * blockDim.x + threadIdx.x); c < cols;
       c += 2 * gridDim.y * blockDim.x) {
    float2 sum = make_float2(0.0f, 0.0f);
    bool from_host = false;
    for (int k = 0; k < top_k; ++k) {
      const int row = position[token * top_k + k];
      from_host |= row == kHost;
      if (row >= 0 && y != nullptr) {
        const float w = weight[token * top_k + k];
        const u32 pair = *reinterpret_cast<const u32*>(y + (i64)row * cols + c);
        sum.x += w * bf16_low(pair);
        sum.y += w * bf16_high(pair);
      }
    }
    const i64 at = token * cols + c;
    const float2 r = *reinterpret_cast<const float2*>(residual + at);
    sum.x += r.x;
    sum.y += r.y;
    if (from_host) {
      const float2 h = __ldcv(reinterpret_cast<const float2*>(host + at));
      sum.x += h.x;
      sum.y += h.y;
    }
    *reinterpret_cast<float2*>(out + at) = sum;
  }
}
