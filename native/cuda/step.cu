// step.cu: the small kernels of a step: norms, quantisation, rotary, hand-off, embedding.
// Follows linear.cu in one NVRTC compilation.

constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    v += __shfl_xor_sync(~0u, v, s);
  }
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, s));
  }
  return v;
}
// Sum over a block of up to 1024 threads; every thread gets it.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float parts[33];
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) {
    parts[threadIdx.x >> 5] = v;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float p = threadIdx.x < (blockDim.x + 31) / 32 ? parts[threadIdx.x] : 0.0f;
    p = warp_sum(p);
    if (threadIdx.x == 0) {
      parts[32] = p;
    }
  }
  __syncthreads();
  const float result = parts[32];
  __syncthreads();
  return result;
}

// Whether this block is the last of `blocks` to come here, which then sees what the others wrote;
// resets the counter. Fences are cumulative: one thread's, after a barrier, order what its block
// has written or seen, and are cheaper than one of every thread.
__device__ __forceinline__ bool last_block(u32* arrived, int blocks, int* is_last) {
  __syncthreads();
  if (blocks == 1) {
    return true;
  }
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = atomicAdd(arrived, 1u) == blocks - 1;
    if (*is_last) {
      __threadfence();
      *arrived = 0;
    }
  }
  __syncthreads();
  return *is_last != 0;
}

__device__ __forceinline__ u16 to_bf16(float f) { return (u16)bf16_pair(f, 0.0f); }

// Where a row of activations goes; unused targets are null.
struct Prepared {
  float* f32;  // [T, cols]
  u16* bf16;   // [T, cols]
  Acts quantized;
};

// One warp, one 32-column block, one value per lane. Same rounding as the CPU's prepare.
__device__ __forceinline__ void store_prepared(const Prepared& to, i64 row, int cols, int k,
                                               float v) {
  if (to.f32 != nullptr) {
    to.f32[row * cols + k] = v;
  }
  if (to.bf16 != nullptr) {
    to.bf16[row * cols + k] = to_bf16(v);
  }
  if (to.quantized.q != nullptr) {
    store_quantized(to.quantized, row, k / 32, v);
  }
}

// y = x / rms(x) * w, one block per row; cols is a multiple of 32.
extern "C" __global__ void rms_norm(const float* x, const float* w, float eps, int cols,
                                    Prepared to) {
  release_next();
  wait_for_previous();
  const i64 row = blockIdx.x;
  const float* from = x + row * cols;
  float squares = 0.0f;
  for (int k = threadIdx.x; k < cols; k += blockDim.x) {
    squares += from[k] * from[k];
  }
  const float factor = rsqrtf(block_sum(squares) / cols + eps);
  for (int k = threadIdx.x; k < cols; k += blockDim.x) {
    store_prepared(to, row, cols, k, from[k] * factor * w[k]);
  }
}

// Prepares rows of f32 or bf16 values; grid = (rows, column chunks).
extern "C" __global__ void prepare(const float* x, const u16* x16, int cols, Prepared to) {
  release_next();
  wait_for_previous();
  const i64 row = blockIdx.x;
  for (int k = blockIdx.y * blockDim.x + threadIdx.x; k < cols; k += gridDim.y * blockDim.x) {
    const float v =
        x != nullptr ? x[row * cols + k] : __uint_as_float((u32)x16[row * cols + k] << 16);
    store_prepared(to, row, cols, k, v);
  }
}

// silu(a) * b, prepared; grid = (rows, column chunks).
extern "C" __global__ void silu_mul(const float* a, const float* b, int cols, Prepared to) {
  release_next();
  wait_for_previous();
  const i64 row = blockIdx.x;
  for (int k = blockIdx.y * blockDim.x + threadIdx.x; k < cols; k += gridDim.y * blockDim.x) {
    const float g = a[row * cols + k];
    store_prepared(to, row, cols, k, g / (1.0f + __expf(-g)) * b[row * cols + k]);
  }
}

struct Rope {
  const float* inverse_frequencies;  // [dims / 2]
  const float* q_norm;               // [D] or null
  const float* k_norm;
  float eps, multiplier;
  int q_heads, kv_heads, dim, rotary_dims, neox;
  int fp8;  // pages hold e4m3 instead of bf16
};

// Nearest e4m3 (ties to even), at most 448 in magnitude; in integers, as no GPU before sm_89 has
// it.
static __device__ u8 to_e4m3(float x) {
  const u8 sign = (u8)(__float_as_uint(x) >> 31 << 7);
  if (x != x) {
    return 0x7f;
  }
  const float size = fminf(fabsf(x), 448.0f);
  if (size < 0.015625f) {  // below 2^-6: multiples of 2^-9
    return sign | (u8)__float2int_rn(size * 512.0f);
  }
  u32 bits = __float_as_uint(size);
  bits += 0x7ffff + (bits >> 20 & 1);
  return sign | (u8)((bits >> 20) - (120 << 3));
}

// Norms and rotates q and k (f32, rows so many values apart), stores q * q_scale as bf16 [T, QH,
// D], k and v into their pages (bf16 or e4m3 [P, 2, page, KH, D]). grid = (T, QH + 2 KH), one warp
// per head, D a multiple of 32,
// <= 256.
extern "C" __global__ void attention_inputs(const float* q, const float* k, const float* v,
                                            i64 q_stride, i64 k_stride, i64 v_stride,
                                            const int* positions, const int* kv_slot, Rope p,
                                            float q_scale, int page_size, u16* q_out, void* cache) {
  release_next();
  wait_for_previous();
  const int token = blockIdx.x, head = blockIdx.y, lane = threadIdx.x;
  const int d = p.dim, n = d / kWarp;
  const bool is_q = head < p.q_heads, is_v = head >= p.q_heads + p.kv_heads;
  const int h = is_q ? head : (head - p.q_heads) % p.kv_heads;
  const float* from = h * d + (is_q   ? q + token * q_stride
                               : is_v ? v + token * v_stride
                                      : k + token * k_stride);
  extern __shared__ float values[];
  float squares = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float x = from[lane + i * kWarp];
    values[lane + i * kWarp] = x;
    squares += x * x;
  }
  const float* norm = is_q ? p.q_norm : (is_v ? nullptr : p.k_norm);
  if (norm != nullptr) {
    const float factor = rsqrtf(warp_sum(squares) / d + p.eps);
    for (int i = 0; i < n; ++i) {
      values[lane + i * kWarp] *= factor * norm[lane + i * kWarp];
    }
  }
  __syncwarp();
  if (!is_v) {
    const int half = p.rotary_dims / 2;
    const float position = (float)positions[token];
    for (int i = lane; i < half; i += kWarp) {
      const float angle = position * p.inverse_frequencies[i];
      const float c = cosf(angle) * p.multiplier, s = sinf(angle) * p.multiplier;
      const int a = p.neox ? i : 2 * i, b = p.neox ? i + half : 2 * i + 1;
      const float x = values[a], y = values[b];
      values[a] = x * c - y * s;
      values[b] = y * c + x * s;
    }
    __syncwarp();
  }
  const i64 slot = kv_slot[token];
  if (!is_q && slot < 0) {
    return;
  }
  const i64 at =
      is_q ? ((i64)token * p.q_heads + h) * d
           : (((slot / page_size * 2 + is_v) * page_size + slot % page_size) * p.kv_heads + h) * d;
  if (!is_q && p.fp8) {
    u8* to = (u8*)cache + at;
    for (int i = 0; i < n; ++i) {
      to[lane + i * kWarp] = to_e4m3(values[lane + i * kWarp]);
    }
    return;
  }
  u16* to = (is_q ? q_out : (u16*)cache) + at;
  const float factor = is_q ? q_scale : 1.0f;
  for (int i = 0; i < n; ++i) {
    to[lane + i * kWarp] = to_bf16(values[lane + i * kWarp] * factor);
  }
}

// ---- hand-off of routed experts to the CPU (see native/src/device/handoff.h) ----

// Tells the CPU that all is there. After a barrier of the block, and last_block where several
// wrote: the release orders everything that this thread knows of.
__device__ __forceinline__ void raise_flag(u32* flag) {
  if (threadIdx.x == 0) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(1u) : "memory");
  }
}

// Copies x, ids and weights of a layer to pinned memory and raises the layer's request flag.
extern "C" __global__ void handoff_signal(const float* x, const int* ids, const float* weights,
                                          int num_x, int num_ids, float* host_x, int* host_ids,
                                          float* host_weights, u32* flag, u32* arrived) {
  release_next();
  wait_for_previous();
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  for (int i = first; i < num_x / 4; i += step) {
    reinterpret_cast<float4*>(host_x)[i] = reinterpret_cast<const float4*>(x)[i];
  }
  for (int i = first; i < num_ids; i += step) {
    host_ids[i] = ids[i];
    host_weights[i] = weights[i];
  }
  __shared__ int is_last;
  if (last_block(arrived, gridDim.x, &is_last)) {
    raise_flag(flag);
  }
}

// What the blocks of one layer's wait share, in device memory; zero between launches.
struct Waiting {
  u32 left;   // blocks that have taken their part
  u32 state;  // what the first block saw
};

// Waits for a layer's done flag, at most `limit` clock ticks: 1 = ready, 2 = the CPU failed, 3 = it
// did not answer. All but 1 are left in *error; the graph always ends. The whole block. Only then
// releases the next kernel: it and those after it would fill the GPU while the CPU computes, and a
// prompt beside the decode step could not run. Only the first block looks at the CPU's flag: reads
// of one line over the bus are served one after another, each in about a microsecond.
__device__ __forceinline__ u32 await_done(const u32* done, Waiting* shared, u32* error, i64 limit) {
  __shared__ u32 state;
  if (threadIdx.x == 0) {
    const i64 begin = clock64();
    u32 value = 0;
    while (value == 0) {
      if (blockIdx.x == 0) {
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(done) : "memory");
      } else {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(value)
                     : "l"(&shared->state)
                     : "memory");
      }
      if (value == 0 && clock64() - begin > limit) {
        value = 3;
      }
    }
    if (blockIdx.x == 0 && gridDim.x > 1) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(&shared->state), "r"(value)
                   : "memory");
    }
    if (value != 1) {
      *error = value;
    }
    state = value;
  }
  __syncthreads();
  release_next();
  return state;
}

// The last block to leave takes the flags down.
__device__ __forceinline__ void leave_done(u32* done, Waiting* shared) {
  __syncthreads();
  if (threadIdx.x == 0 && (gridDim.x == 1 || atomicAdd(&shared->left, 1u) == gridDim.x - 1)) {
    shared->left = 0;
    shared->state = 0;
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(done), "r"(0u) : "memory");
  }
}

// Waits for the CPU, then out = residual + its result.
extern "C" __global__ void handoff_wait(const float* host_out, const float* residual, int num,
                                        u32* done, Waiting* shared, u32* error, i64 limit,
                                        float* out) {
  wait_for_previous();
  const u32 state = await_done(done, shared, error, limit);
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  for (int i = first; i < num / 4; i += step) {
    float4 v = reinterpret_cast<const float4*>(residual)[i];
    if (state == 1) {
      const float4 c = __ldcv(reinterpret_cast<const float4*>(host_out) + i);
      v.x += c.x;
      v.y += c.y;
      v.z += c.z;
      v.w += c.w;
    }
    reinterpret_cast<float4*>(out)[i] = v;
  }
  leave_done(done, shared);
}

// The same, and y = out / rms(out) * norm; one block per row; dynamic shared memory: cols floats.
extern "C" __global__ void __launch_bounds__(1024)
    handoff_wait_norm(const float* host_out, const float* residual, int cols, u32* done,
                      Waiting* shared, u32* error, i64 limit, float* out, const float* norm,
                      float eps, Prepared to) {
  extern __shared__ __align__(16) float total[];
  wait_for_previous();
  const i64 row = blockIdx.x;
  const float4* from = reinterpret_cast<const float4*>(host_out + row * cols);
  const float4* add = reinterpret_cast<const float4*>(residual + row * cols);
  float4* sums = reinterpret_cast<float4*>(total);
  for (int i = threadIdx.x; i < cols / 4; i += blockDim.x) {
    sums[i] = add[i];
  }
  const u32 state = await_done(done, shared, error, limit);
#pragma unroll 4
  for (int i = threadIdx.x; i < cols / 4; i += blockDim.x) {
    float4 v = sums[i];
    if (state == 1) {
      const float4 c = __ldcv(from + i);  // few wide reads: each crosses the bus by itself
      v.x += c.x;
      v.y += c.y;
      v.z += c.z;
      v.w += c.w;
    }
    reinterpret_cast<float4*>(out + row * cols)[i] = v;
    sums[i] = v;
  }
  __syncthreads();
  float squares = 0.0f;  // added up in the order of rms_norm
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    squares += total[c] * total[c];
  }
  const float factor = rsqrtf(block_sum(squares) / cols + eps);
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    store_prepared(to, row, cols, c, total[c] * factor * norm[c]);
  }
  leave_done(done, shared);
}

// ---- embedding and row gathering ----

// x[t, H] = row tokens[t] of the table; tokens below 0 name a logit row of the previous step.
extern "C" __global__ void embed(Matrix table, const int* tokens, const int* sampled, float* x) {
  release_next();
  wait_for_previous();
  int id = tokens[blockIdx.x];
  if (id < 0) {
    id = sampled[-1 - id];
  }
  const u8* band = table.data + (i64)(id / 16) * table.band_bytes;
  float* to = x + (i64)blockIdx.x * table.cols;
  const int row = id % 16, units = (table.cols / 32 + kUnitBlocks - 1) / kUnitBlocks;
  for (int u = threadIdx.x >> 5; u < units; u += blockDim.x >> 5) {
    decode_any(table.type, band, table.cols, u, [=](int r, int column, const float (&v)[8]) {
      if (r == row) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          to[column + i] = v[i];
        }
      }
    });
  }
}

// Pieces of the step's metadata block, in words.
struct Pieces {
  int start[16];
  int count[16];
};

// Brings a decode step's metadata from pinned host memory, piece blockIdx.x of it. Not by the copy
// engine: a prompt's experts may be queued there for many milliseconds.
extern "C" __global__ void load_block(const int* host, int* device, Pieces pieces) {
  wait_for_previous();
  const int start = pieces.start[blockIdx.x], count = pieces.count[blockIdx.x];
  // Pieces begin on 64 bytes and are padded to them: whole vectors never leave the block.
  const float4* from = reinterpret_cast<const float4*>(host + start);
  float4* to = reinterpret_cast<float4*>(device + start);
  const int vectors = (count + 3) / 4;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < vectors; i += gridDim.y * blockDim.x) {
    to[i] = __ldcv(from + i);
  }
}
