// sample.cu: logits -> token ids on the GPU, one block of 1024 threads per logit row.
// Follows step.cu in one NVRTC compilation. The rules are those of the CPU sampler
// (native/src/model/sampler.h): bias and penalties, temperature, top_k, top_p, min_p, a counter-
// based draw; log-probabilities are those of the raw logits.

typedef unsigned long long u64;

// kt_sample_params of native/include/kt.h.
struct SampleParams {
  u64 seq_id, seed;
  int token_index, target, position, top_k;
  float temperature, top_p, min_p, presence, frequency, repetition;
  int num_logprobs, bias_start, bias_count, history_start, history_count, row, mask_row, reserved;
};

constexpr int kSampleThreads = 1024;
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

// Largest value and its lowest index among values below (bound, bound_at) in that order.
__device__ __forceinline__ void block_argmax(const float* values, int n, float bound, int bound_at,
                                             float& best, int& at) {
  __shared__ float best_of[32];
  __shared__ int at_of[32];
  best = kNone;
  at = n;
  for (int i = threadIdx.x; i < n; i += kSampleThreads) {
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

// Sum and count of probabilities >= bound.
__device__ __forceinline__ void mass_from(const float* p, int n, float bound, float& sum,
                                          float& count) {
  float s = 0.0f, c = 0.0f;
  for (int i = threadIdx.x; i < n; i += kSampleThreads) {
    if (p[i] >= bound) {
      s += p[i];
      c += 1.0f;
    }
  }
  sum = block_sum(s);
  count = block_sum(c);
}

// Largest bound whose kept set still has `mass` probability (by_count: `mass` tokens).
__device__ __forceinline__ float find_bound(const float* p, int n, float largest, float mass,
                                            bool by_count) {
  u32 low = 0, high = __float_as_uint(largest);  // positive floats order like their bits
  while (low < high) {
    const u32 middle = low + (high - low + 1) / 2;
    float sum, count;
    mass_from(p, n, __uint_as_float(middle), sum, count);
    if ((by_count ? count : sum) >= mass) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return __uint_as_float(low);
}

// logits f32 [S, V] stay as they are; work is scratch of the same size.
extern "C" __global__ void __launch_bounds__(kSampleThreads)
    sample(const float* logits, float* work, int vocab, int sample_vocab,
           const SampleParams* params, const int* bias_ids, const float* bias_values,
           const int* history_ids, const int* history_counts, int* tokens, float* logprobs,
           int* top_ids, float* top_logprobs) {
  release_next();
  wait_for_previous();
  const SampleParams p = params[blockIdx.x];
  const float* raw = logits + (i64)blockIdx.x * vocab;
  float* z = work + (i64)blockIdx.x * vocab;
  const int t = threadIdx.x;
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
      block_argmax(raw, vocab, bound, bound_at, bound, bound_at);
      if (t == 0) {
        top_ids[blockIdx.x * kMaxLogprobs + k] = bound_at;
        top_logprobs[blockIdx.x * kMaxLogprobs + k] = bound - normaliser;
      }
    }
  }
  if (p.target >= 0) {
    if (t == 0) {
      tokens[blockIdx.x] = p.target;
      logprobs[blockIdx.x] = raw[p.target] - normaliser;
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
  float best;
  int token;
  block_argmax(z, sample_vocab, 3.4e38f, -1, best, token);
  if (p.temperature > 0.0f) {
    float sum = 0.0f;
    for (int i = t; i < sample_vocab; i += kSampleThreads) {
      z[i] = expf((z[i] - best) / p.temperature);
      sum += z[i];
    }
    sum = block_sum(sum);
    float bound = 0.0f;
    if (p.top_k > 0 && p.top_k < sample_vocab) {
      bound = find_bound(z, sample_vocab, 1.0f, (float)p.top_k, true);
    }
    if (p.top_p < 1.0f) {
      float kept, count;
      mass_from(z, sample_vocab, bound, kept, count);
      bound = fmaxf(bound, find_bound(z, sample_vocab, 1.0f, kept * p.top_p, false));
    }
    bound = fmaxf(bound, p.min_p);
    float kept, count;
    mass_from(z, sample_vocab, bound, kept, count);
    const float wanted = uniform(p.seed, (u32)p.position) * kept;
    // Inverse of the cumulative sum in id order: slices per thread, then inside one slice.
    __shared__ float slice_sum[kSampleThreads];
    __shared__ int found;
    const int width = (sample_vocab + kSampleThreads - 1) / kSampleThreads;
    const int first = min(t * width, sample_vocab), end = min(first + width, sample_vocab);
    float mine = 0.0f;
    for (int i = first; i < end; ++i) {
      mine += z[i] >= bound ? z[i] : 0.0f;
    }
    slice_sum[t] = mine;
    __syncthreads();
    if (t == 0) {
      float before = 0.0f;
      int slice = 0, last = 0;
      for (; slice < kSampleThreads; ++slice) {
        if (slice_sum[slice] > 0.0f) {
          last = slice;
        }
        if (slice_sum[slice] > 0.0f && before + slice_sum[slice] > wanted) {
          break;
        }
        before += slice_sum[slice];
      }
      if (slice == kSampleThreads) {  // rounding at the end: the last kept token
        slice = last;
        before = kNone;
      }
      int pick = -1;
      for (int i = slice * width; i < min((slice + 1) * width, sample_vocab); ++i) {
        if (z[i] < bound || z[i] <= 0.0f) {
          continue;
        }
        pick = i;
        before += z[i];
        if (before > wanted) {
          break;
        }
      }
      found = pick;
    }
    __syncthreads();
    token = found;
  }
  if (t == 0) {
    tokens[blockIdx.x] = token;
    logprobs[blockIdx.x] = raw[token] - normaliser;
  }
}
