// router.cu: from the hidden state of decode rows to the experts that compute them, in one launch:
// norm, router product, choice and weights of each token's experts, the (token, expert) pairs by
// expert. Also the sum of the experts' outputs with the norm that follows it. Follows sample.cu in
// one NVRTC compilation.
//
// All additions of a token happen in an order that does not depend on the other tokens.

constexpr int kRouterThreads = 256, kRouterWarps = kRouterThreads / kWarp;
constexpr int kMaxExperts = 1024;
constexpr int kMaxPairs = 1024;
constexpr int kAhead = 16;  // float4 of a router row that a lane loads before it must wait

struct Routing {
  int experts, top_k, sigmoid, renormalise, groups, groups_used, sum_of_two;
  float scale;
  const float* selection_bias;  // [E] or null
};

// Experts of groups that are not among the best become unlikely; one warp.
__device__ __forceinline__ void choose_groups(const Routing& p, float* choice, float* group) {
  const int lane = threadIdx.x & 31, size = p.experts / p.groups;
  for (int g = lane; g < p.groups; g += kWarp) {
    float best = -3.4e38f, second = -3.4e38f;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      if (choice[e] > best) {
        second = best;
        best = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    group[g] = p.sum_of_two ? best + second : best;
  }
  __syncwarp();
  for (int g = lane; g < p.groups; g += kWarp) {
    int better = 0;
    for (int o = 0; o < p.groups; ++o) {
      better += group[o] > group[g] || (group[o] == group[g] && o < g);
    }
    if (better >= p.groups_used) {
      for (int e = g * size; e < (g + 1) * size; ++e) {
        choice[e] = -3.2e38f;
      }
    }
  }
}

// The input of the router. norm: its weights, null if x is normed already.
struct RouterInput {
  const float* x;  // [T, cols]
  const float* norm;
  float eps;
  int cols;
  const float* weight;  // [E, cols]
  Prepared to;          // the normed x, for others
};

// Pinned memory of the CPU that computes the experts (native/src/device/handoff.h); x null: nobody.
struct Signal {
  float* x;        // [T, cols]
  int* ids;        // [T, K]
  float* weights;  // [T, K]
  u32* flag;       // raised when all is there
};

struct RouterOutput {
  float* logits;   // [T, E]
  u32* arrived;    // [T + 1], zero between launches
  int* ids;        // [T, K]
  float* weights;  // [T, K]
  Groups groups;   // active null: nobody needs them
  Signal signal;
};

struct Choosing {
  float score[kMaxExperts];
  alignas(16) float choice[kMaxExperts + 4];
  float group[kMaxExperts];
  int chosen[kWarp];
};
struct Grouping {
  int count[kMaxExperts], first[kMaxExperts];
  u16 expert_of[kMaxPairs];
  int warp_total[kRouterWarps];
};
union RouterShared {
  Choosing choosing;
  Grouping grouping;
};

// Scores of one token's logits, and what they are chosen by; one warp.
__device__ __forceinline__ void score_experts(const float* logits, const Routing& p,
                                              Choosing& shared) {
  const int lane = threadIdx.x & 31;
  float largest = -3.4e38f, total = 0.0f;
  for (int e = lane; e < p.experts; e += kWarp) {
    shared.choice[e] = __ldcg(logits + e);
    largest = fmaxf(largest, shared.choice[e]);
  }
  largest = warp_max(largest);
  for (int e = lane; e < p.experts; e += kWarp) {
    const float z = shared.choice[e];
    const float s = p.sigmoid ? 1.0f / (1.0f + expf(-z)) : expf(z - largest);
    shared.score[e] = s;
    total += s;
  }
  total = warp_sum(total);
  for (int e = lane; e < p.experts; e += kWarp) {
    if (!p.sigmoid) {
      shared.score[e] /= total;
    }
    const float bias = p.selection_bias != nullptr ? p.selection_bias[e] : 0.0f;
    shared.choice[e] = shared.score[e] + bias;
  }
  if (lane < 4) {
    shared.choice[p.experts + lane] = -3.4e38f;
  }
  shared.chosen[lane] = lane % p.experts;  // logits that are no numbers must not leave holes
  __syncwarp();
  if (p.groups > 1) {
    choose_groups(p, shared.choice, shared.group);
  }
}

// Picks the top_k experts of one token, ties to the lower id; the whole block.
__device__ __forceinline__ void choose_experts(const float* logits, const Routing& p, i64 token,
                                               const RouterOutput& out, Choosing& shared) {
  const int t = threadIdx.x, lane = t & 31;
  if (t < kWarp) {
    score_experts(logits, p, shared);
  }
  __syncthreads();
  // An expert's place is the number of better ones: no chain of top_k searches. Of few experts, 2
  // or 4 threads count for each.
  const int parts = p.experts <= kRouterThreads / 4 ? 4 : p.experts <= kRouterThreads / 2 ? 2 : 1;
  for (int first = 0; first < p.experts; first += kRouterThreads / parts) {
    const int e = first + t / parts;
    const float mine = e < p.experts ? shared.choice[e] : 0.0f;
    int place = 0;
    for (int o = t % parts * 4; o < p.experts; o += 4 * parts) {
      const float4 c = *reinterpret_cast<const float4*>(shared.choice + o);
      place += (c.x > mine || (c.x == mine && o < e)) + (c.y > mine || (c.y == mine && o + 1 < e)) +
               (c.z > mine || (c.z == mine && o + 2 < e)) +
               (c.w > mine || (c.w == mine && o + 3 < e));
    }
    for (int step = 1; step < parts; step <<= 1) {
      place += __shfl_xor_sync(~0u, place, step);
    }
    if (e < p.experts && place < p.top_k) {
      shared.chosen[place] = e;
    }
  }
  __syncthreads();
  if (t < kWarp) {
    float sum = 0.0f;
    for (int k = 0; k < p.top_k; ++k) {
      sum += shared.score[shared.chosen[k]];
    }
    if (lane < p.top_k) {
      const float mine = shared.score[shared.chosen[lane]];
      out.ids[token * p.top_k + lane] = shared.chosen[lane];
      const float weight = (p.renormalise ? mine / sum : mine) * p.scale;
      out.weights[token * p.top_k + lane] = weight;
      if (out.signal.x != nullptr) {
        out.signal.ids[token * p.top_k + lane] = shared.chosen[lane];
        out.signal.weights[token * p.top_k + lane] = weight;
      }
    }
  }
}

// The pairs by expert, in pair order within one; the whole block. Same result as group_pairs.
__device__ __forceinline__ void group_block(const int* ids, int pairs, int experts, const Groups& g,
                                            Grouping& shared) {
  constexpr int kPer = kMaxExperts / kRouterThreads;
  int* count = shared.count;
  int* first = shared.first;
  u16* expert_of = shared.expert_of;
  const int t = threadIdx.x, lane = t & 31;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    count[t * kPer + i] = 0;
  }
  __syncthreads();
  for (int i = t; i < pairs; i += kRouterThreads) {
    const int e = __ldcg(ids + i);
    expert_of[i] = (u16)e;
    atomicAdd(count + e, 1);
  }
  __syncthreads();
  // Both prefix sums at once: pairs before an expert in the low half, active experts in the high.
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int c = count[t * kPer + i];
    mine += c + (c > 0 ? 1 << 16 : 0);
  }
  int sum = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step <<= 1) {
    const int left = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) {
      sum += left;
    }
  }
  if (lane == kWarp - 1) {
    shared.warp_total[t / kWarp] = sum;
  }
  __syncthreads();
  int before = sum - mine;
  for (int w = 0; w < t / kWarp; ++w) {
    before += shared.warp_total[w];
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int e = t * kPer + i, c = count[e];
    first[e] = before & 0xffff;
    if (e <= experts) {
      g.start[e] = before & 0xffff;
    }
    if (c > 0) {
      g.active[before >> 16] = e;
    }
    before += c + (c > 0 ? 1 << 16 : 0);
  }
  if (t == kRouterThreads - 1) {
    g.active[experts] = before >> 16;
    g.start[experts] = pairs;
  }
  __syncthreads();
  for (int i = t; i < pairs; i += kRouterThreads) {
    int earlier = 0;
    for (int j = 0; j < i; ++j) {
      earlier += expert_of[j] == expert_of[i];
    }
    g.order[first[expert_of[i]] + earlier] = i;
  }
}

// grid = (ceil(E / 8), T), one expert per warp; dynamic shared memory: cols floats.
extern "C" __global__ void __launch_bounds__(kRouterThreads)
    router(RouterInput in, Routing p, RouterOutput out) {
  extern __shared__ float4 normed[];
  __shared__ RouterShared shared;
  __shared__ int is_last;
  const int t = threadIdx.x, lane = t & 31, warp = t / kWarp, quads = in.cols / 4;
  const i64 token = blockIdx.y;
  const int e = blockIdx.x * kRouterWarps + warp;
  release_next();
  const float4* w =
      reinterpret_cast<const float4*>(in.weight + (i64)min(e, p.experts - 1) * in.cols);
  float4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int at = lane + i * kWarp;
    ahead[i] = at < quads ? __ldg(w + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  wait_for_previous();
  const float4* x = reinterpret_cast<const float4*>(in.x + token * in.cols);
  float squares = 0.0f;
  for (int i = t; i < quads; i += kRouterThreads) {
    const float4 v = x[i];
    normed[i] = v;
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  if (in.norm != nullptr) {
    const float factor = rsqrtf(block_sum(squares) / in.cols + in.eps);
    for (int i = t; i < quads; i += kRouterThreads) {
      const float4 g = __ldg(reinterpret_cast<const float4*>(in.norm) + i);
      float4 v = normed[i];
      v.x *= factor * g.x;
      v.y *= factor * g.y;
      v.z *= factor * g.z;
      v.w *= factor * g.w;
      normed[i] = v;
    }
  }
  __syncthreads();
  const bool signals = out.signal.x != nullptr;
  if (signals && warp == 0) {
    float4* host = reinterpret_cast<float4*>(out.signal.x + token * in.cols);
    for (int i = blockIdx.x * kWarp + lane; i < quads; i += gridDim.x * kWarp) {
      host[i] = normed[i];
    }
  }
  if (in.norm != nullptr) {
    const float* values = reinterpret_cast<const float*>(normed);
    for (int b = e; b < in.cols / kWarp; b += gridDim.x * kRouterWarps) {
      store_prepared(in.to, token, in.cols, b * kWarp + lane, values[b * kWarp + lane]);
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int at = lane + i * kWarp;
    if (at < quads) {
      const float4 a = normed[at], b = ahead[i];
      sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
    }
  }
#pragma unroll 4
  for (int at = lane + kAhead * kWarp; at < quads; at += kWarp) {
    const float4 a = normed[at], b = __ldg(w + at);
    sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
  }
  sum = warp_sum(sum);
  if (lane == 0 && e < p.experts) {
    out.logits[token * p.experts + e] = sum;
  }
  if (!last_block(out.arrived + token, gridDim.x, &is_last)) {
    return;
  }
  choose_experts(out.logits + token * p.experts, p, token, out, shared.choosing);
  if (out.groups.active == nullptr && !signals) {
    return;
  }
  if (!last_block(out.arrived + gridDim.y, gridDim.y, &is_last)) {
    return;
  }
  if (signals) {
    raise_flag(out.signal.flag);
  }
  if (out.groups.active == nullptr) {
    return;
  }
  group_block(out.ids, gridDim.y * p.top_k, p.experts, out.groups, shared.grouping);
}

// logits[t, e] = x[t] . w[e] for many rows, every sum by one thread in the order of the columns:
// cuBLAS would add up differently for another number of rows. grid = (ceil(E / 32), ceil(T / 64)).
constexpr int kProductRows = 64, kProductExperts = 32, kProductCols = 32;
extern "C" __global__ void __launch_bounds__(kRouterThreads)
    router_product(const float* x, const float* w, int rows, int cols, int experts, float* logits) {
  __shared__ alignas(16) float xs[kProductCols][kProductRows + 4];
  __shared__ alignas(16) float ws[kProductCols][kProductExperts + 4];
  release_next();
  wait_for_previous();
  const int t = threadIdx.x, row = t / 16 * 4, expert = t % 16 * 2;
  const i64 first_row = blockIdx.y * kProductRows, first_expert = blockIdx.x * kProductExperts;
  float sum[4][2] = {};
  for (int k = 0; k < cols; k += kProductCols) {
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const i64 r = first_row + t / 4;
      const int c = t % 4 * 8 + 4 * i;
      const float4 v = r < rows ? *reinterpret_cast<const float4*>(x + r * cols + k + c) : zero;
      xs[c][t / 4] = v.x;
      xs[c + 1][t / 4] = v.y;
      xs[c + 2][t / 4] = v.z;
      xs[c + 3][t / 4] = v.w;
    }
    const i64 e = first_expert + t / 8;
    const int c = t % 8 * 4;
    const float4 v = e < experts ? *reinterpret_cast<const float4*>(w + e * cols + k + c) : zero;
    ws[c][t / 8] = v.x;
    ws[c + 1][t / 8] = v.y;
    ws[c + 2][t / 8] = v.z;
    ws[c + 3][t / 8] = v.w;
    __syncthreads();
#pragma unroll 8
    for (int j = 0; j < kProductCols; ++j) {
      const float4 a = *reinterpret_cast<const float4*>(&xs[j][row]);
      const float2 b = *reinterpret_cast<const float2*>(&ws[j][expert]);
      sum[0][0] += a.x * b.x;
      sum[0][1] += a.x * b.y;
      sum[1][0] += a.y * b.x;
      sum[1][1] += a.y * b.y;
      sum[2][0] += a.z * b.x;
      sum[2][1] += a.z * b.y;
      sum[3][0] += a.w * b.x;
      sum[3][1] += a.w * b.y;
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (first_row + row + i < rows && first_expert + expert + j < experts) {
        logits[(first_row + row + i) * experts + first_expert + expert + j] = sum[i][j];
      }
    }
  }
}

// The experts of prompt tokens from logits [T, E]; one block per token.
extern "C" __global__ void __launch_bounds__(kRouterThreads)
    route(const float* logits, Routing p, int* ids, float* weights) {
  __shared__ Choosing shared;
  release_next();
  wait_for_previous();
  RouterOutput out = {};
  out.ids = ids;
  out.weights = weights;
  const i64 token = blockIdx.x;
  choose_experts(logits + token * p.experts, p, token, out, shared);
}

// sum = residual + the experts' outputs as in experts_sum, then y = sum / rms(sum) * norm; one
// block per row; dynamic shared memory: cols floats.
extern "C" __global__ void __launch_bounds__(1024)
    experts_sum_norm(const float* y, const int* expert_of, const float* weight, int top_k, int cols,
                     const float* residual, float* sum, const float* norm, float eps, Prepared to) {
  extern __shared__ float total[];
  release_next();
  wait_for_previous();
  const i64 row = blockIdx.x;
  float squares = 0.0f;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    float added = 0.0f;
#pragma unroll 8
    for (int k = 0; k < top_k; ++k) {
      const i64 pair = row * top_k + k;
      if (expert_of[pair] >= 0) {
        added += weight[pair] * y[pair * cols + c];
      }
    }
    const float v = residual[row * cols + c] + added;
    sum[row * cols + c] = v;
    total[c] = v;
    squares += v * v;
  }
  const float factor = rsqrtf(block_sum(squares) / cols + eps);
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    store_prepared(to, row, cols, c, total[c] * factor * norm[c]);
  }
}
