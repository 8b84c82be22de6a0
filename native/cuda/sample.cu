// sample.cu: logits -> token ids on the GPU, kSampleBlocks blocks of 1024 threads per logit row,
// the last of which to arrive decides. Rows that only want the largest logit share its search, what
// others want is done by that one block. Follows step.cu in one NVRTC compilation. The rules are
// those of the CPU sampler (native/src/model/sampler.h): bias and penalties, temperature, top_k,
// top_p, min_p, a counter- based draw; log-probabilities are those of the raw logits.

typedef unsigned long long u64;

// kt_sample_params of native/include/kt.h.
struct SampleParams {
  u64 seq_id, seed;
  int token_index, target, position, top_k;
  float temperature, top_p, min_p, presence, frequency, repetition;
  int num_logprobs, bias_start, bias_count, history_start, history_count, row, mask_row, reserved;
};

constexpr int kSampleThreads = 1024;
constexpr int kSampleBlocks = 16;  // of one row
constexpr int kMaxLogprobs = 20;
constexpr float kNone = -3.4e38f;

__device__ __forceinline__ float block_max(float v) {
  __shared__ float parts[33];
  v = warp_max(v);
  if ((threadIdx.x & 31) == 0) {
    parts[threadIdx.x >> 5] = v;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const float p = warp_max(parts[threadIdx.x]);
    if (threadIdx.x == 0) {
      parts[32] = p;
    }
  }
  __syncthreads();
  const float result = parts[32];
  __syncthreads();
  return result;
}

// Largest value and its lowest index among values[first .. n) below (bound, bound_at) in that
// order.
__device__ __forceinline__ void block_argmax(const float* values, int first, int n, float bound,
                                             int bound_at, float& best, int& at) {
  __shared__ float best_of[32];
  __shared__ int at_of[32];
  best = kNone;
  at = n;
  for (int i = first + threadIdx.x; i < n; i += kSampleThreads) {
    const float v = values[i];
    const bool open = v < bound || (v == bound && i > bound_at);
    if (open && v > best) {
      best = v;
      at = i;
    }
  }
#pragma unroll
  for (int round = 0; round < 2; ++round) {
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) {
      const float other = __shfl_xor_sync(~0u, best, s);
      const int where = __shfl_xor_sync(~0u, at, s);
      if (other > best || (other == best && where < at)) {
        best = other;
        at = where;
      }
    }
    if (round == 0) {
      if ((threadIdx.x & 31) == 0) {
        best_of[threadIdx.x >> 5] = best;
        at_of[threadIdx.x >> 5] = at;
      }
      __syncthreads();
      best = best_of[threadIdx.x & 31];
      at = at_of[threadIdx.x & 31];
    }
  }
  __syncthreads();
}

// Philox 4x32-10 (Salmon et al., SC 2011): uniform in [0, 1) from (seed, position).
__device__ __forceinline__ float uniform(u64 seed, u32 position) {
  u32 c[4] = {position, 0, 0, 0};
  u32 key[2] = {(u32)seed, (u32)(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const u64 a = (u64)0xD2511F53u * c[0], b = (u64)0xCD9E8D57u * c[2];
    const u32 next[4] = {(u32)(b >> 32) ^ c[1] ^ key[0], (u32)b, (u32)(a >> 32) ^ c[3] ^ key[1],
                         (u32)a};
    for (int i = 0; i < 4; ++i) {
      c[i] = next[i];
    }
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return (c[0] >> 8) * (1.0f / 16777216.0f);
}

// Sum (or, by_count, number) of probabilities >= bound.
__device__ __forceinline__ float mass_from(const float* p, int n, float bound, bool by_count) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += kSampleThreads) {
    sum += p[i] >= bound ? (by_count ? 1.0f : p[i]) : 0.0f;
  }
  return block_sum(sum);
}

// Largest bound whose kept set still has `mass` probability (by_count: `mass` tokens).
__device__ __forceinline__ float find_bound(const float* p, int n, float largest, float mass,
                                            bool by_count) {
  u32 low = 0, high = __float_as_uint(largest);  // positive floats order like their bits
  while (low < high) {
    const u32 middle = low + (high - low + 1) / 2;
    if (mass_from(p, n, __uint_as_float(middle), by_count) >= mass) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return __uint_as_float(low);
}

// Tokens with at least kCut times the largest probability, in id order: where few tokens hold what
// top_k, top_p or min_p can keep, everything after one pass over the vocabulary is about them.
constexpr int kCandidates = 2048;
constexpr float kCut = 1.0f / 8192.0f;
struct Candidates {
  float p[kCandidates];
  int id[kCandidates];
  int before[kSampleThreads / kWarp];  // candidates of a warp, then of those before it
};

// z becomes exp((z - best) / temperature); the sum of all. Sets count and mass of the candidates,
// and collects them if they fit. A warp's ids are contiguous.
__device__ __forceinline__ float exponentiate(float* z, int n, float best, float temperature,
                                              Candidates& c, int& count, float& mass) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / kWarp;
  constexpr int kWarps = kSampleThreads / kWarp;
  const int width = (n + kSampleThreads - 1) / kSampleThreads * kWarp;
  const int first = min(warp * width, n), end = min(first + width, n);
  float sum = 0.0f, above = 0.0f;
  int mine = 0;
  for (int i = first + lane; i < end; i += kWarp) {
    const float p = expf((z[i] - best) / temperature);
    z[i] = p;
    sum += p;
    above += p >= kCut ? p : 0.0f;
    mine += p >= kCut;
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    mine += __shfl_xor_sync(~0u, mine, s);
  }
  if (lane == 0) {
    c.before[warp] = mine;
  }
  sum = block_sum(sum);
  mass = block_sum(above);
  int start = 0;
  count = 0;
  for (int w = 0; w < kWarps; ++w) {
    start += w < warp ? c.before[w] : 0;
    count += c.before[w];
  }
  if (count <= kCandidates && mine > 0) {
    for (int base = first; base < end; base += kWarp) {
      const int i = base + lane;
      const float p = i < end ? z[i] : 0.0f;
      const u32 chosen = __ballot_sync(~0u, p >= kCut);
      if (p >= kCut) {
        const int at = start + __popc(chosen & ((1u << lane) - 1));
        c.p[at] = p;
        c.id[at] = i;
      }
      start += __popc(chosen);
    }
  }
  __syncthreads();
  return sum;
}

// The index whose share of [0, sum of p >= bound) holds `wanted`: inverse of the cumulative sum in
// index order. The last kept one when rounding leaves none.
__device__ __forceinline__ int draw(const float* p, int n, float bound, float wanted) {
  __shared__ float warp_sums[kSampleThreads / kWarp];
  __shared__ int found, last;
  const int t = threadIdx.x, lane = t & 31;
  const int width = (n + kSampleThreads - 1) / kSampleThreads;
  const int first = min(t * width, n), end = min(first + width, n);
  float mine = 0.0f;
  for (int i = first; i < end; ++i) {
    mine += p[i] >= bound ? p[i] : 0.0f;
  }
  float upto = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step <<= 1) {
    const float left = __shfl_up_sync(~0u, upto, step);
    upto += lane >= step ? left : 0.0f;
  }
  if (lane == kWarp - 1) {
    warp_sums[t / kWarp] = upto;
  }
  if (t == 0) {
    found = kSampleThreads;
    last = 0;
  }
  __syncthreads();
  float before = upto - mine;
  for (int w = 0; w < t / kWarp; ++w) {
    before += warp_sums[w];
  }
  if (mine > 0.0f) {
    atomicMax(&last, t);
    if (before + mine > wanted) {
      atomicMin(&found, t);
    }
  }
  __syncthreads();
  const bool is_beyond = found == kSampleThreads;
  const int slice = is_beyond ? last : found;
  __syncthreads();
  if (t == slice) {
    int pick = first;
    for (int i = first; i < end; ++i) {
      if (p[i] < bound || p[i] <= 0.0f) {
        continue;
      }
      pick = i;
      before += p[i];
      if (!is_beyond && before > wanted) {
        break;
      }
    }
    found = pick;
  }
  __syncthreads();
  return found;
}

// What the blocks of a row leave for the last of them.
struct SampleShares {
  float* best;   // [S, kSampleBlocks]
  int* at;       // [S, kSampleBlocks]
  u32* arrived;  // [S], zero between launches
};

// logits f32 [S, V] stay as they are; work is scratch of the same size. grid = (kSampleBlocks, S).
extern "C" __global__ void __launch_bounds__(kSampleThreads)
    sample(const float* logits, float* work, int vocab, int sample_vocab,
           const SampleParams* params, const int* bias_ids, const float* bias_values,
           const int* history_ids, const int* history_counts, SampleShares shares, int* tokens,
           float* logprobs, int* top_ids, float* top_logprobs) {
  __shared__ int is_last;
  release_next();
  const int row = blockIdx.y, t = threadIdx.x;
  const SampleParams p = params[row];
  const float* raw = logits + (i64)row * vocab;
  float* z = work + (i64)row * vocab;
  const bool is_plain = p.temperature <= 0.0f && p.num_logprobs < 0 && p.target < 0 &&
                        p.history_count == 0 && p.bias_count == 0;
  float best;
  int token;
  wait_for_previous();
  if (is_plain) {
    const int width = (sample_vocab + kSampleBlocks - 1) / kSampleBlocks;
    const int first = blockIdx.x * width;
    block_argmax(raw, first, min(first + width, sample_vocab), 3.4e38f, -1, best, token);
    if (t == 0) {
      shares.best[row * kSampleBlocks + blockIdx.x] = best;
      shares.at[row * kSampleBlocks + blockIdx.x] = token;
    }
  }
  if (!last_block(shares.arrived + row, kSampleBlocks, &is_last)) {
    return;
  }
  if (is_plain) {
    if (t == 0) {
      best = kNone;
      token = 0;  // logits that are no numbers give a token nevertheless
      for (int i = 0; i < kSampleBlocks; ++i) {  // in id order: the lowest of equals wins
        const float v = __ldcg(shares.best + row * kSampleBlocks + i);
        if (v > best) {
          best = v;
          token = __ldcg(shares.at + row * kSampleBlocks + i);
        }
      }
      tokens[row] = token;
      logprobs[row] = best;
    }
    return;
  }
  float normaliser = 0.0f;
  if (p.num_logprobs >= 0 || p.target >= 0) {
    float largest = kNone, sum = 0.0f;
    for (int i = t; i < vocab; i += kSampleThreads) {
      largest = fmaxf(largest, raw[i]);
    }
    largest = block_max(largest);
    for (int i = t; i < vocab; i += kSampleThreads) {
      sum += expf(raw[i] - largest);
    }
    normaliser = largest + logf(block_sum(sum));
    float bound = 3.4e38f;
    int bound_at = -1;
    for (int k = 0; k < p.num_logprobs && k < kMaxLogprobs; ++k) {
      block_argmax(raw, 0, vocab, bound, bound_at, bound, bound_at);
      if (t == 0) {
        top_ids[row * kMaxLogprobs + k] = bound_at;
        top_logprobs[row * kMaxLogprobs + k] = bound - normaliser;
      }
    }
  }
  if (p.target >= 0) {
    if (t == 0) {
      tokens[row] = p.target;
      logprobs[row] = raw[p.target] - normaliser;
    }
    return;
  }
  for (int i = t; i < sample_vocab; i += kSampleThreads) {
    z[i] = raw[i];
  }
  __syncthreads();
  for (int i = t; i < p.history_count; i += kSampleThreads) {
    const int id = history_ids[p.history_start + i], count = history_counts[p.history_start + i];
    if (id >= sample_vocab) {
      continue;
    }
    float v = z[id];
    v = v > 0.0f ? v / p.repetition : v * p.repetition;
    if (count > 0) {
      v -= p.presence + p.frequency * count;
    }
    z[id] = v;
  }
  __syncthreads();
  for (int i = t; i < p.bias_count; i += kSampleThreads) {
    const int id = bias_ids[p.bias_start + i];
    if (id < sample_vocab) {
      z[id] += bias_values[p.bias_start + i];
    }
  }
  __syncthreads();
  block_argmax(z, 0, sample_vocab, 3.4e38f, -1, best, token);
  if (p.temperature > 0.0f) {
    __shared__ Candidates candidates;
    int count;
    float mass;
    const float sum = exponentiate(z, sample_vocab, best, p.temperature, candidates, count, mass);
    const bool has_top_k = p.top_k > 0 && p.top_k < sample_vocab;
    // Whether the bound is certain to be kCut or more, so that no other token can be kept.
    const bool is_enough = has_top_k        ? count >= p.top_k
                           : p.top_p < 1.0f ? mass >= sum * p.top_p
                                            : p.min_p >= kCut;
    const bool is_short = count <= kCandidates && is_enough;
    const float* from = is_short ? candidates.p : z;
    const int n = is_short ? count : sample_vocab;
    float bound = 0.0f;
    if (has_top_k) {
      bound = find_bound(from, n, 1.0f, (float)p.top_k, true);
    }
    if (p.top_p < 1.0f) {
      const float kept = has_top_k ? mass_from(from, n, bound, false) : sum;
      bound = fmaxf(bound, find_bound(from, n, 1.0f, kept * p.top_p, false));
    }
    bound = fmaxf(bound, p.min_p);
    const float wanted = uniform(p.seed, (u32)p.position) * mass_from(from, n, bound, false);
    token = draw(from, n, bound, wanted);
    if (is_short) {
      token = candidates.id[token];
    }
  }
  if (t == 0) {
    tokens[row] = token;
    logprobs[row] = raw[token] - normaliser;
  }
}
